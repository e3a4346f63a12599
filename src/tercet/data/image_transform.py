"""Image files to pixels while training, with augmentation."""

import io
import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from tercet.data.splits import text_fingerprint
from tercet.data.text_transform import content_hash
from tercet.errors import InputError
from tercet.images import PixelFormat, UnreadableImage, read_image_cell, to_array
from tercet.messages import warn_once
from tercet.types import Batch, BatchIndices, Images, Source

QUALITY = (10, 90)  # of JPEG, as far as FaceNet's table 5 goes
ERASED = (0.02, 0.2)  # of the area (Zhong et al. 2020, arXiv:1708.04896, up to 0.4 there)
ASPECT = 3 / 4


@dataclass(frozen=True)
class Augmentation:
    """Random changes, in this order; 0 turns one off, but ``crop``, which is off at 1.

    ``crop``: a part of at least this share of the area, or as much of it as a square holds, stretched by no more than
    that share nor 3:4, is made S x S;
    ``flip``: the probability of a mirror image; ``color``: brightness, contrast and (of colors) saturation change by up
    to this share; ``jpeg``: the probability of a second compression, of quality 10 to 90; ``erase``: that of a rectangle
    of noise over 2 to 20 % of the image.
    """

    flip: float
    crop: float
    color: float
    erase: float
    jpeg: float

    def __post_init__(self) -> None:
        for name in ("flip", "color", "erase", "jpeg"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"data.transform.augment.{name}={getattr(self, name)}: from 0 (off) to 1.")
        if not 0 < self.crop <= 1:
            raise InputError(f"data.transform.augment.crop={self.crop}: a share of the area, above 0, up to 1 (off).")

    def __call__(self, picture: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
        """A picture of any size to one of ``size x size``; the same for the same state of ``rng``."""
        picture = self._cropped(picture, size, rng)
        if rng.random() < self.flip:
            picture = ImageOps.mirror(picture)
        if self.color:
            for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
                picture = change(picture).enhance(rng.uniform(1 - self.color, 1 + self.color))
        if rng.random() < self.jpeg:
            picture = _compressed(picture, int(rng.integers(QUALITY[0], QUALITY[1] + 1)))
        return _erased(picture, rng) if rng.random() < self.erase else picture

    def _cropped(self, picture: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
        if self.crop == 1:
            return ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC)
        box = _box(picture.width, picture.height, self.crop, rng)
        return picture.resize((size, size), Image.Resampling.BICUBIC, box=box)


def _box(width: int, height: int, crop: float, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """A random part, no more stretched than said whatever the picture's shape: what sticks out makes it smaller."""
    area = width * height * rng.uniform(crop, 1)
    most = -math.log(max(ASPECT, crop))
    ratio = math.exp(rng.uniform(-most, most))
    wide, high = min(width, math.sqrt(area * ratio)), min(height, math.sqrt(area / ratio))
    wide, high = min(wide, high * math.exp(most)), min(high, wide * math.exp(most))
    left, top = rng.uniform(0, width - wide), rng.uniform(0, height - high)
    return left, top, min(width, left + wide), min(height, top + high)


def _compressed(picture: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "jpeg", quality=quality)
    return Image.open(file).convert(picture.mode)


def _erased(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    area = picture.width * picture.height * rng.uniform(*ERASED)
    ratio = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
    width = max(1, min(picture.width, round(math.sqrt(area * ratio))))
    height = max(1, min(picture.height, round(math.sqrt(area / ratio))))
    left, top = (int(rng.integers(0, most + 1)) for most in (picture.width - width, picture.height - height))
    shape = (height, width, 3) if picture.mode == "RGB" else (height, width)
    out = picture.copy()
    out.paste(Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)), (left, top))
    return out


UNREADABLE = (UnreadableImage, OSError)  # what it holds, or a file that is gone
PROBES = 16


@dataclass(frozen=True)
class ImageTransform:
    """Reads rows of images as ``pixels`` says, each time they are drawn, changed by ``augment`` (null: as they are)."""

    pixels: PixelFormat
    augment: Augmentation | None

    def load(self, source: Source) -> "ImageRows":
        """The source's rows; a few are decoded to see that they are images."""
        if len(source.columns) != 1:
            raise InputError(f"Images are read from one column, but the data has {', '.join(source.columns)}.")
        rows = ImageRows(source.rows(), source.columns[0], self)
        rows.check()
        return rows

    def fingerprint(self, columns: Sequence[str]) -> str:
        """Changes when the pixels would."""
        return text_fingerprint(repr((list(columns), astuple(self)))[:4096])[:16]


class ImageRows:
    """``draw -> Batch``: a row that cannot be read is named once, left out and counted in ``Batch.num_unreadable``, never fatal."""

    def __init__(self, rows: Dataset, column: str, decoding: ImageTransform) -> None:
        self.rows = rows
        self.column = column
        self.decoding = decoding
        known = rows["label"][:] if "label" in rows.column_names else [-1] * len(rows)
        self._label = torch.tensor([-1 if x is None else x for x in known], dtype=torch.long)
        # Shared by the loader's workers, which begin anew each epoch.
        self._named = torch.zeros(len(rows), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def label(self) -> Tensor:
        """``(N,)``, -1 where there is none."""
        return self._label

    @property
    def position(self) -> Tensor:
        """``(N,)``: images have no place."""
        return torch.full_like(self._label, -1)

    def check(self) -> None:
        """Raise ``InputError`` if none of a few rows, from all over, can be read: then it is most likely the column."""
        some = np.unique(np.linspace(0, len(self) - 1, PROBES).astype(int)).tolist()
        cells = self.rows[some][self.column]
        faults = [fault for cell in cells if (fault := self._fault(cell))]
        if len(faults) < len(cells):
            return
        raise InputError(
            f"None of {len(some)} rows that were tried holds an image that can be used; the first is "
            f"{self._where(some[0], cells[0])}: {faults[0]}. "
            "data.image names the column, data.path the files."
        )

    def __getitem__(self, draw: BatchIndices) -> Batch:
        """What augmentation draws depends on the draw's seed and the row alone, not on who reads it."""
        arrays, kept, hashes = [], [], []
        for row, cell in zip(draw.rows, self.rows[draw.rows][self.column], strict=True):
            try:
                data = _data(cell)
                arrays.append(self._pixels(data, np.random.default_rng([draw.seed, row])))
            except UNREADABLE as error:
                self._say(row, cell, error)
                continue
            kept.append(row)
            hashes.append(content_hash(data))
        p = self.decoding.pixels
        pixels = np.stack(arrays) if arrays else np.zeros((0, p.channels, p.size, p.size), dtype=np.uint8)
        uid = torch.tensor(kept, dtype=torch.long)
        return Batch(
            views=(Images(torch.from_numpy(pixels)),),
            example_id=uid,
            label=self._label[uid],
            position=torch.full_like(uid, -1),
            content_hash=torch.tensor(hashes, dtype=torch.long)[None],
            num_unreadable=len(draw.rows) - len(kept),
        )

    def _fault(self, cell: Any) -> Exception | None:
        try:
            self.decoding.pixels.open(_data(cell))
        except UNREADABLE as error:
            return error
        return None

    def _pixels(self, data: bytes, rng: np.random.Generator) -> Any:
        pixels, augment = self.decoding.pixels, self.decoding.augment
        picture = pixels.open(data)
        return to_array(augment(picture, pixels.size, rng) if augment else pixels.fit(picture))

    def _say(self, row: int, cell: Any, error: Exception) -> None:
        if not self._named[row]:
            self._named[row] = True
            warn_once(f"An image cannot be used and is left out: {self._where(row, cell)}: {error}.")

    def _where(self, row: int, cell: Any) -> str:
        number, path, kind = int(self._label[row]), (cell or {}).get("path"), self.rows.features.get("label")
        name = f" (label {kind.int2str(number)})" if isinstance(kind, ClassLabel) and number >= 0 else ""
        return f"row {row + 1} of {len(self)}{name}{f', {path}' if path else ''}"


def _data(cell: Any) -> bytes:
    if cell is None or (cell["bytes"] is None and cell["path"] is None):
        raise UnreadableImage("the cell is empty")
    return read_image_cell(cell)
