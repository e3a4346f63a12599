"""Which rows make a batch: decided for the global batch, then sliced by process."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from tercet.distributed import rank, world_size


def own_slice(size: int) -> slice:
    """This process's part of a global batch of ``size`` rows; parts differ by at most one row."""
    return slice(size * rank() // world_size(), size * (rank() + 1) // world_size())


class GlobalBatches(Sampler[list[int]]):
    """Each epoch a permutation of ``rows`` drawn from (seed, epoch) alone, cut into batches of ``batch_size``.

    The number of processes changes nothing: together they hold the same rows. The tail that fills no batch is left
    out (every batch has the same number of negatives); another epoch leaves out other rows.
    """

    def __init__(self, rows: int, batch_size: int, seed: int) -> None:
        self.rows = rows
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning says which epoch begins."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        # Two seeds in one number: epochs of one run never meet those of a run with a seed nearby.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.rows, generator=generator)
        own = own_slice(self.batch_size)
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            yield order[start : start + self.batch_size][own].tolist()
