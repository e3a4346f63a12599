"""Which rows make a batch: decided for the global batch, then sliced by process."""

from collections.abc import Callable, Iterator
from itertools import islice

import torch
from torch.utils.data import Sampler

from tercet.contract import Draw, Rows
from tercet.distributed import rank, world_size


def own_slice(size: int) -> slice:
    """This process's part of a global batch of ``size`` rows; parts differ by at most one row."""
    return slice(size * rank() // world_size(), size * (rank() + 1) // world_size())


def one_number(*parts: int) -> int:
    """Several seeds in one number: epochs of one run never meet those of a run with a seed nearby."""
    number = 0
    for part in parts:
        number = (number * 1_000_003 + part) % (1 << 63)
    return number


class GlobalBatches(Sampler[Draw]):
    """Each epoch a permutation of the rows drawn from (seed, epoch) alone, cut into batches of ``batch_size``.

    The number of processes changes nothing: together they hold the same rows. The tail that fills no batch is left
    out (every batch has the same number of negatives); another epoch leaves out other rows.
    """

    def __init__(self, rows: Rows, batch_size: int, seed: int) -> None:
        self.rows = len(rows)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning says which epoch begins."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows // self.batch_size

    def __iter__(self) -> Iterator[Draw]:
        generator = torch.Generator().manual_seed(one_number(self.seed, self.epoch))
        order = torch.randperm(self.rows, generator=generator)
        own = own_slice(self.batch_size)
        for number in range(len(self)):
            rows = order[number * self.batch_size : (number + 1) * self.batch_size]
            yield Draw(rows[own].tolist(), one_number(self.seed, self.epoch, number))


class Rest(Sampler[Draw]):
    """What is left of an epoch where a run goes on in the middle of it: ``done`` says how many batches it has had."""

    def __init__(self, whole: Sampler[Draw], done: Callable[[], int]) -> None:
        self.whole = whole
        self.done = done

    def set_epoch(self, epoch: int) -> None:
        """Lightning says which epoch begins."""
        self.whole.set_epoch(epoch)  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return len(self.whole)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Draw]:
        yield from islice(self.whole, self.done() % len(self), None)
