"""The data module: a source of rows becomes batches."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any, Protocol

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from tercet.data.samplers import RandomBatchSampler, ResumableSampler
from tercet.data.text_transform import StreamingBatches, TextTransform
from tercet.distributed.processes import block_signals, start_worker
from tercet.errors import InputError, require
from tercet.training.lightning_compat import EvaluationHooks, epoch_and_batches, injects_distributed_sampler, progress_of_epoch
from tercet.types import Batch, BatchDataset, BatchIndices, Source

Plan = Callable[[Batch, int], Batch]  # makes a batch ready for a step
SHARED_BYTES = 1 << 18  # a tensor of a worker that has more comes in shared memory, which the first process opens and maps


class Transform(Protocol):
    """How rows become inputs of a model: ``TextTransform`` or ``ImageTransform``."""

    def load(self, source: Source) -> BatchDataset:
        """All rows of a source, transformed or ready to be."""

    def fingerprint(self, columns: Sequence[str]) -> str:
        """A hash that changes when the inputs of these columns would."""


@dataclass(frozen=True)
class RunLength:
    """The length of a run by the number of its rows: ``epochs`` passes, ``at_most`` steps, and ``validations`` on the way.

    >>> RunLength(epochs=10, at_most=1000).steps(rows=192, batch_size=32)
    60
    """

    epochs: float = 10
    at_most: int = 1000
    validations: int = 10

    def __post_init__(self) -> None:
        require(self.epochs > 0, f"`epochs`={self.epochs}: a number above 0 is needed.")
        for name in ("at_most", "validations"):
            require(getattr(self, name) >= 1, f"`{name}`={getattr(self, name)}: 1 or more.")

    def steps(self, rows: int | None, batch_size: int) -> int:
        """The number of steps of ``batch_size`` rows; of a stream, whose ``rows`` are None, as many as there may be."""
        return self.at_most if rows is None else max(1, min(self.at_most, math.ceil(self.epochs * (rows // batch_size))))


class PlannedRows(Dataset[Batch]):
    """Rows whose batches workers make ready for their step, where ``find_plan()`` gives what they do that with."""

    def __init__(self, rows: BatchDataset, find_plan: Callable[[], Plan | None]) -> None:
        self.rows, self.find_plan = rows, find_plan
        self.plan: Plan | None = None

    def __getitem__(self, indices: BatchIndices) -> Batch:
        batch = self.rows[indices]
        return self.plan(batch, indices.step) if self.plan else batch

    def __getstate__(self) -> dict[str, Any]:
        """What is sent to a worker."""
        return {"rows": self.rows, "plan": self.plan}


class LazyLoader(DataLoader[Batch]):
    """A loader whose workers start when the first batch is asked for, and do not get the signals that stop a run.

    Lightning makes an iterator before it restores the progress of a checkpoint and tells the sampler its epoch. Workers, which
    fetch ahead at once, would be given the rows of another epoch. At a signal the step is completed, with their batches.
    """

    dataset: PlannedRows

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        self.dataset.plan = self.dataset.find_plan() if self.num_workers else None
        with block_signals():
            batches = super().__iter__()
        yield from batches


class DataModule(EvaluationHooks, pl.LightningDataModule):
    """Training batches: rows of ``source``, transformed by ``transform``, in the batches that ``sampler`` draws.

    ``batch_size`` is that of the global batch, over all processes; the Trainer needs ``use_distributed_sampler=False``.
    ``sampler`` takes the transformed rows, ``batch_size`` and ``seed``. A source with ``streaming`` is read in order and
    shuffled in a buffer of ``shuffle_buffer`` rows. ``workers`` processes load batches (0: the main one).
    """

    def __init__(
        self, source: Source, transform: Transform,
        sampler: Callable[[BatchDataset, int, int], Sampler[BatchIndices]] = RandomBatchSampler,
        batch_size: int = 64, seed: int = 1, workers: int = 0, shuffle_buffer: int = 10_000, name: str = "source",
    ) -> None:  # fmt: skip
        super().__init__()
        require(batch_size >= 2, f"`batch_size`={batch_size}: a contrast needs at least 2 rows in a batch.")
        require(workers >= 0, f"`workers`={workers}: 0 (the main process reads) or more.")
        self.source, self.transform, self.make_sampler = source, transform, sampler
        self.batch_size, self.seed, self.workers = batch_size, seed, workers
        self.shuffle_buffer, self.name = shuffle_buffer, name
        self.columns = list(source.columns)
        self.streaming = bool(getattr(source, "streaming", False))
        self.dataset: BatchDataset | None = None
        self.sampler: Sampler[BatchIndices] | None = None
        self.epoch, self.num_skipped = 0, 0  # where a stream starts

    def load_rows(self) -> None:
        """Read and transform the rows, once."""
        if not self.streaming and self.dataset is None:
            self.dataset = self.transform.load(self.source)

    def prepare_data(self) -> None:
        """Load the rows and check that they fill a batch: Lightning calls this again, and ``setup`` in every process."""
        self.load_rows()
        if self.dataset is None or self.sampler is not None:
            return
        rows, sampler = self.dataset, self.make_sampler(self.dataset, self.batch_size, self.seed)
        require(
            len(rows) >= self.batch_size,
            f"`batch_size`={self.batch_size}, but the data ({self.name}) has {len(rows)} training rows. "
            f"Use `batch_size`={max(2, len(rows) // 2)} or more data.",
        )
        self.sampler = sampler

    def num_rows(self) -> int | None:
        """The number of training rows, read only if they are not prepared yet; None of a stream."""
        return None if self.streaming else len(self.source.rows() if self.dataset is None else self.dataset)

    def setup(self, stage: str) -> None:
        """Open what the first process has prepared."""
        if self.trainer is not None and injects_distributed_sampler(self.trainer):
            raise InputError("Batches are split among the processes already. Use a Trainer with use_distributed_sampler=False.")
        self.prepare_data()

    def train_dataloader(self) -> "DataLoader[Batch]":
        """A loader of this process's part of each global batch."""
        if self.dataset is None:
            if not isinstance(self.transform, TextTransform):
                kind = type(self.transform).__name__
                raise InputError(f"`source` is a stream, which only a TextTransform reads, not {kind}.")
            settings = self.batch_size, self.seed, self.shuffle_buffer
            return DataLoader(StreamingBatches(self.source, self.transform, *settings, self._start_of_epoch), batch_size=None)
        assert self.sampler is not None
        sampler = ResumableSampler(self.sampler, lambda: progress_of_epoch(self.trainer))
        generator = torch.Generator()  # for the workers' seeds; torch's own generator is training's
        started: dict[str, Any] = {"num_workers": self.workers, "worker_init_fn": _start_worker, "generator": generator}
        return LazyLoader(PlannedRows(self.dataset, self._find_plan), batch_size=None, sampler=sampler, **started)

    def _find_plan(self) -> Plan | None:
        module: Any = self.trainer.lightning_module if self.trainer else None
        plan: Plan | None = module.plan_of_workers() if hasattr(module, "plan_of_workers") else None
        return plan

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Let the objective make its views on the CPU, while the device works, unless they belong on the device."""
        module: Any = self.trainer.lightning_module if self.trainer else None
        return module.prepare(batch) if isinstance(batch, Batch) and not getattr(module, "views_on_device", True) else batch

    def state_dict(self) -> dict[str, Any]:
        """The epoch and its number of processed batches, for streams: they start before Lightning's loops are restored."""
        epoch, done = epoch_and_batches(self.trainer)
        return {"epoch": epoch, "done": done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let a stream continue where the checkpoint was."""
        self.epoch, self.num_skipped = state_dict["epoch"], state_dict["done"]

    def _start_of_epoch(self) -> tuple[int, int]:
        """The epoch that begins and how many of its batches are skipped: none in the epochs after the first."""
        start = self.epoch, self.num_skipped
        self.epoch, self.num_skipped = self.epoch + 1, 0
        return start

    def fingerprint(self) -> str:
        """A hash of the training rows and of how they are transformed."""
        return f"{self.source.fingerprint()}-{self.transform.fingerprint(self.columns)}"


def _start_worker(number: int) -> None:
    start_worker(number)
    ForkingPickler.register(Tensor, _reduce)


def _reduce(x: Tensor) -> Any:
    """How a worker sends a tensor: few integers by their values, which costs the first process a third of the time."""
    by_value = x.nbytes <= SHARED_BYTES and not x.is_floating_point()  # numpy has no bfloat16
    return (torch.from_numpy, (x.numpy(),)) if by_value else reduce_tensor(x)
