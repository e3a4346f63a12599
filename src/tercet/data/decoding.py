"""Image files to pixels, while training."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset
from torch import Tensor

from tercet.contract import Batch, Draw, Images, Source
from tercet.data.augment import Augment
from tercet.data.fingerprint import text_print
from tercet.data.rows import content_hash
from tercet.error import InputError
from tercet.image import BadImage, Pixels, content, to_array
from tercet.notice import say_once

UNREADABLE = (BadImage, OSError)  # what it holds, or a file that is gone
PROBES = 16


@dataclass(frozen=True)
class Decoding:
    """Reads rows of images as ``pixels`` says, each time they are drawn, changed by ``augment`` (null: as they are)."""

    pixels: Pixels
    augment: Augment | None

    def open(self, source: Source) -> "ImageRows":
        """The source's rows; a few are decoded to see that they are images."""
        if len(source.columns) != 1:
            raise InputError(f"Images are read from one column, but the data has {', '.join(source.columns)}.")
        rows = ImageRows(source.rows(), source.columns[0], self)
        rows.check()
        return rows

    def fingerprint(self, columns: Sequence[str]) -> str:
        """Changes when the pixels would."""
        return text_print(repr((list(columns), astuple(self)))[:4096])[:16]


class ImageRows:
    """``draw -> Batch``: a row that cannot be read is named once, left out and counted in ``Batch.lost``, never fatal."""

    def __init__(self, rows: Dataset, column: str, decoding: Decoding) -> None:
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

    def __getitem__(self, draw: Draw) -> Batch:
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
            uid=uid,
            label=self._label[uid],
            position=torch.full_like(uid, -1),
            content=torch.tensor(hashes, dtype=torch.long)[None],
            lost=len(draw.rows) - len(kept),
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
            say_once(f"An image cannot be used and is left out: {self._where(row, cell)}: {error}.")

    def _where(self, row: int, cell: Any) -> str:
        number, path, kind = int(self._label[row]), (cell or {}).get("path"), self.rows.features.get("label")
        name = f" (label {kind.int2str(number)})" if isinstance(kind, ClassLabel) and number >= 0 else ""
        return f"row {row + 1} of {len(self)}{name}{f', {path}' if path else ''}"


def _data(cell: Any) -> bytes:
    if cell is None or (cell["bytes"] is None and cell["path"] is None):
        raise BadImage("the cell is empty")
    return content(cell)
