"""Image files to pixels, while training."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from tercet.contract import Batch, Draw, Images, Source
from tercet.data.augment import Augment
from tercet.data.fingerprint import text_print
from tercet.data.rows import content_hash
from tercet.error import InputError
from tercet.image import BadImage, Pixels, content, to_array
from tercet.notice import say_once


@dataclass(frozen=True)
class Decoding:
    """Reads rows of images as ``pixels`` says, each time they are drawn, changed by ``augment`` (null: as they are)."""

    pixels: Pixels
    augment: Augment | None

    def open(self, source: Source) -> "ImageRows":
        """The source's rows; nothing is decoded yet."""
        if len(source.columns) != 1:
            raise InputError(f"Images are read from one column, but the data has {', '.join(source.columns)}.")
        return ImageRows(source.rows(), source.columns[0], self)

    def fingerprint(self, columns: Sequence[str]) -> str:
        """Changes when the pixels would."""
        return text_print(repr((list(columns), astuple(self)))[:4096])[:16]


class ImageRows:
    """``draw -> Batch``: a row that cannot be read is named, left out and counted in ``Batch.lost``, never fatal."""

    def __init__(self, rows: Dataset, column: str, decoding: Decoding) -> None:
        self.rows = rows
        self.column = column
        self.decoding = decoding
        known = rows["label"][:] if "label" in rows.column_names else [-1] * len(rows)
        self._label = torch.tensor([-1 if x is None else x for x in known], dtype=torch.long)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def label(self) -> Tensor:
        """``(N,)``, -1 where there is none."""
        return self._label

    def __getitem__(self, draw: Draw) -> Batch:
        """What augmentation draws depends on the draw's seed and the row alone, not on who reads it."""
        arrays, kept, hashes = [], [], []
        for row, cell in zip(draw.rows, self.rows[draw.rows][self.column], strict=True):
            try:
                data = content(cell)
                arrays.append(self._pixels(data, np.random.default_rng([draw.seed, row])))
            except (BadImage, OSError, TypeError) as error:  # a file that is gone, a cell without anything
                where = (cell or {}).get("path") or f"row {row + 1}"
                say_once(f"An image cannot be used and is left out: {where}: {error}.")
                continue
            kept.append(row)
            hashes.append(content_hash(data))
        p = self.decoding.pixels
        pixels = np.stack(arrays) if arrays else np.zeros((0, p.channels, p.size, p.size), dtype=np.uint8)
        uid = torch.tensor(kept, dtype=torch.long)
        return Batch(
            views=(Images(torch.from_numpy(pixels)),),
            uid=uid,
            label=self._label[uid],
            position=torch.full_like(uid, -1),
            content=torch.tensor(hashes, dtype=torch.long)[None],
            lost=len(draw.rows) - len(kept),
        )

    def _pixels(self, data: bytes, rng: np.random.Generator) -> Any:
        pixels, augment = self.decoding.pixels, self.decoding.augment
        picture = pixels.open(data)
        return to_array(augment(picture, pixels.size, rng) if augment else pixels.fit(picture))
