"""Turn images into pixels when they are drawn, with random augmentation."""

import io
import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image, ImageEnhance, ImageOps

from tercet.data.columns import text_fingerprint
from tercet.data.text_transform import content_hash
from tercet.errors import InputError, require
from tercet.images import PixelFormat, UnreadableImage, read_image_cell, to_array
from tercet.messages import warn_once
from tercet.types import Batch, BatchIndices, Images, Source

QUALITY = (10, 90)  # of JPEG: the range of FaceNet's table 5
ERASED = (0.02, 0.2)  # of the area; up to 0.4 in Zhong et al. 2020 (arXiv:1708.04896)
ASPECT = 3 / 4
UNREADABLE = (UnreadableImage, OSError)  # the content, or a file that is gone
PROBES = 16  # rows that are decoded before training


@dataclass(frozen=True)
class Augmentation:
    """Random changes of an image, in the order crop, flip, color, jpeg, erase, cutoff; 0 turns one off, except ``crop``: 1.

    ``crop``: a random part of at least this share of the area, or as much of it as a square holds, with an aspect ratio of at
    most 1 to max(``crop``, 3/4), is resized to S x S. ``flip``: the probability of a mirror image. ``color``: brightness,
    contrast and saturation change by up to this share. ``jpeg``: the probability of JPEG compression of quality 10 to 90.
    ``erase``: the probability that a rectangle of 2 to 20 % of the area becomes noise; ``cutoff``: that the pixels of one
    become 0 (DeVries and Taylor 2017, arXiv:1708.04552).

    >>> picture = Image.new("RGB", (50, 40))
    >>> Augmentation(crop=0.6)(picture, 32, np.random.default_rng(0)).size
    (32, 32)
    """

    flip: float = 0.5
    crop: float = 1.0
    color: float = 0.0
    erase: float = 0.0
    jpeg: float = 0.0
    cutoff: float = 0.0

    def __post_init__(self) -> None:
        for name in ("flip", "color", "erase", "jpeg", "cutoff"):
            require(0 <= getattr(self, name) <= 1, f"`{name}`={getattr(self, name)}: from 0 (off) to 1.")
        require(0 < self.crop <= 1, f"`crop`={self.crop}: a share of the area, above 0, up to 1 (off).")

    def __call__(self, picture: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
        """Change a picture of any size to one of ``size x size``; the result depends on the state of ``rng`` alone."""
        if self.crop == 1:
            picture = ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC)
        else:
            box = _box(picture.width, picture.height, self.crop, rng)
            picture = picture.resize((size, size), Image.Resampling.BICUBIC, box=box)
        if rng.random() < self.flip:
            picture = ImageOps.mirror(picture)
        if self.color:
            for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
                picture = change(picture).enhance(rng.uniform(1 - self.color, 1 + self.color))
        if rng.random() < self.jpeg:
            file = io.BytesIO()
            picture.save(file, "jpeg", quality=int(rng.integers(QUALITY[0], QUALITY[1] + 1)))
            picture = Image.open(file).convert(picture.mode)
        if rng.random() < self.erase:
            picture = _erase(picture, rng, 256)
        if self.cutoff and rng.random() < self.cutoff:
            picture = _erase(picture, rng, 1)
        return picture


def _box(width: int, height: int, crop: float, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """A random part; where it would not fit into the picture it is smaller, not more stretched."""
    area = width * height * rng.uniform(crop, 1)
    most = -math.log(max(ASPECT, crop))
    ratio = math.exp(rng.uniform(-most, most))
    wide, high = min(width, math.sqrt(area * ratio)), min(height, math.sqrt(area / ratio))
    wide, high = min(wide, high * math.exp(most)), min(high, wide * math.exp(most))
    left, top = rng.uniform(0, width - wide), rng.uniform(0, height - high)
    return left, top, min(width, left + wide), min(height, top + high)


def _erase(picture: Image.Image, rng: np.random.Generator, values: int) -> Image.Image:
    """Fill a random rectangle with noise, of as many ``values`` from 0."""
    area = picture.width * picture.height * rng.uniform(*ERASED)
    ratio = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
    width = max(1, min(picture.width, round(math.sqrt(area * ratio))))
    height = max(1, min(picture.height, round(math.sqrt(area / ratio))))
    left, top = (int(rng.integers(0, most + 1)) for most in (picture.width - width, picture.height - height))
    shape = (height, width, 3) if picture.mode == "RGB" else (height, width)
    out = picture.copy()
    out.paste(Image.fromarray(rng.integers(0, values, shape, dtype=np.uint8)), (left, top))
    return out


@dataclass(frozen=True)
class ImageTransform:
    """Decodes images in the format ``pixels`` each time they are drawn, and changes them by ``augment``, if given.

    >>> pixels = PixelFormat(size=32, channels=1, mean=[0.5], std=[0.5])
    >>> ImageTransform(pixels, Augmentation(flip=0.5)).augment.flip
    0.5
    """

    pixels: PixelFormat
    augment: Augmentation | None = None

    def load(self, source: Source) -> "ImageRows":
        """The source's rows; raises ``InputError`` if none of a few of them can be decoded."""
        require(len(source.columns) == 1, f"Images are read from one column, but the data has {', '.join(source.columns)}.")
        rows = ImageRows(source.rows(), source.columns[0], self)
        rows.check()
        return rows

    def fingerprint(self, columns: Sequence[str]) -> str:
        """A hash of the format and the augmentation."""
        return text_fingerprint(repr((list(columns), astuple(self)))[:4096])[:16]


class ImageRows:
    """The dataset of a source's images: ``dataset[indices]`` is a batch.

    An image that cannot be read is left out of its batch, counted in ``Batch.num_unreadable``, and named in one warning.
    """

    def __init__(self, rows: Dataset, column: str, transform: ImageTransform) -> None:
        self.rows, self.column, self.transform = rows, column, transform
        label = rows["label"][:] if "label" in rows.column_names else [-1] * len(rows)
        self.label = torch.tensor([-1 if x is None else x for x in label], dtype=torch.long)
        self.position = torch.full_like(self.label, -1)
        # In shared memory, because the loader starts new worker processes each epoch.
        self._reported = torch.zeros(len(rows), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.rows)

    def check(self) -> None:
        """Raise ``InputError`` if none of ``PROBES`` rows can be read: most likely the column is the wrong one."""
        probes = np.unique(np.linspace(0, len(self) - 1, PROBES).astype(int)).tolist()
        cells = self.rows[probes][self.column]
        faults = []
        for cell in cells:
            try:
                self.transform.pixels.open(read_image_cell(cell))
            except UNREADABLE as error:  # noqa: PERF203
                faults.append(error)
        if len(faults) == len(cells):
            first = f"the first is {self._describe(probes[0], cells[0])}: {faults[0]}"
            advice = "Name the column of images in the source's image, or other files in its path"
            raise InputError(f"None of {len(probes)} rows that were tried holds an image that can be used; {first}. {advice}.")

    def __getitem__(self, indices: BatchIndices) -> Batch:
        """The augmentation of a row depends on the indices' seed and the row alone, not on the process that reads it."""
        pixels, augment = self.transform.pixels, self.transform.augment
        arrays, readable, hashes = [], [], []
        for row, cell in zip(indices.rows, self.rows[indices.rows][self.column], strict=True):
            try:
                data = read_image_cell(cell)
                picture = pixels.open(data)
                rng = np.random.default_rng([indices.seed, row])
                arrays.append(to_array(augment(picture, pixels.size, rng) if augment else pixels.fit(picture)))
            except UNREADABLE as error:
                if not self._reported[row]:
                    self._reported[row] = True
                    warn_once(f"An image cannot be used and is left out: {self._describe(row, cell)}: {error}.")
                continue
            readable.append(row)
            hashes.append(content_hash(data))
        stack = np.array(arrays, dtype=np.uint8).reshape(-1, pixels.channels, pixels.size, pixels.size)
        ids = torch.tensor(readable, dtype=torch.long)
        return Batch(
            views=(Images(torch.from_numpy(stack)),),
            example_id=ids,
            label=self.label[ids],
            position=torch.full_like(ids, -1),
            content_hash=torch.tensor(hashes, dtype=torch.long)[None],
            num_unreadable=len(indices.rows) - len(readable),
        )

    def _describe(self, row: int, cell: Any) -> str:
        number, path = int(self.label[row]), (cell or {}).get("path")
        names = getattr(self.rows.features.get("label"), "names", None)
        name = f" (label {names[number]})" if names and number >= 0 else ""
        return f"row {row + 1} of {len(self)}{name}{f', {path}' if path else ''}"
