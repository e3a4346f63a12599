"""A sampler of rows in the order of their labels."""

from collections.abc import Iterator
from typing import ClassVar

import torch

from tercet.data.samplers import SeededBatchSampler
from tercet.errors import InputError
from tercet.types import BatchDataset, BatchIndices


class LabelRunSampler(SeededBatchSampler):
    """Rows sorted by label, each epoch from another offset: a batch holds runs of rows of one label.

    An epoch has ``share`` of the batches that the rows fill.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"label", "all_rows"})
    provides: ClassVar[frozenset[str]] = frozenset({"same_label"})

    def __init__(self, dataset: BatchDataset, batch_size: int, seed: int, share: float = 1.0) -> None:
        super().__init__(batch_size, seed)
        if not 0 < share <= 1:
            raise InputError(f"`share`={share}: a number above 0, up to 1. `batch_size` is {batch_size}.")
        self.order = torch.argsort(dataset.label, stable=True)
        self.share = share

    def __len__(self) -> int:
        return max(1, int(self.share * (len(self.order) // self.batch_size)))

    def __iter__(self) -> Iterator[BatchIndices]:
        rows = self.order.roll(self.seed + self.epoch)
        for number in range(len(self)):
            yield self._share(rows[number * self.batch_size : (number + 1) * self.batch_size], number)
