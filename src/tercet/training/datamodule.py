"""The data module: a source of rows becomes batches."""

from collections.abc import Callable, Sequence
from typing import Protocol

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Sampler

from tercet.data.samplers import ResumableSampler
from tercet.data.text_transform import StreamingBatches, TextTransform
from tercet.errors import InputError
from tercet.types import Batch, BatchDataset, BatchIndices, Evaluator, Source


class Transform(Protocol):
    """How rows become inputs: ``Tokenizing`` for text, ``Decoding`` for images."""

    def load(self, source: Source) -> BatchDataset:
        """All rows, made ready."""
        ...

    def fingerprint(self, columns: Sequence[str]) -> str:
        """Changes when the inputs would."""
        ...


class DataModule(pl.LightningDataModule):
    """``train`` gives the rows to learn from, ``reader`` makes inputs of them, ``batches`` says which make a batch.

    ``validation`` is what a validation epoch runs: evaluators in place of batches. ``batch_size`` counts the rows of
    the global batch, over all processes. ``batches`` takes the rows, ``batch_size`` and ``seed``. With
    ``train.streaming`` the rows are read as they come and shuffled in a buffer of ``shuffle_buffer`` rows.
    """

    def __init__(
        self,
        name: str,
        train: Source,
        validation: Sequence[Evaluator],
        transform: Transform,
        sampler: Callable[[BatchDataset, int, int], Sampler[BatchIndices]],
        batch_size: int,
        seed: int,
        workers: int,
        shuffle_buffer: int,
    ) -> None:
        super().__init__()
        if batch_size < 2:
            raise InputError(f"data.batch_size={batch_size}: contrast needs at least 2 rows in a batch.")
        if workers < 0:
            raise InputError(f"data.workers={workers}: 0 (the main process reads) or more.")
        self.name = name
        self.train = train
        self.validation = list(validation)
        self.transform = transform
        self.make_sampler = sampler
        self.batch_size = batch_size
        self.seed = seed
        self.workers = workers
        self.shuffle_buffer = shuffle_buffer
        self.columns = list(train.columns)
        self.streaming = bool(getattr(train, "streaming", False))
        self.dataset: BatchDataset | None = None
        self.sampler: Sampler[BatchIndices] | None = None
        self.epoch, self.skipped = 0, 0  # of a stream

    def prepare_data(self) -> None:
        """Check the rows and make them ready; asked again, as Lightning does, there is nothing to do."""
        if self.streaming or self.dataset is not None:
            return
        rows = self.transform.load(self.train)
        sampler = self.make_sampler(rows, self.batch_size, self.seed)
        if len(rows) < self.batch_size:
            raise InputError(
                f"data.batch_size={self.batch_size}, but data={self.name} has {len(rows)} training rows. "
                f"Use data.batch_size={max(2, len(rows) // 2)} or more data."
            )
        self.sampler, self.dataset = sampler, rows

    def setup(self, stage: str) -> None:
        """Every process opens what the first has prepared."""
        self.prepare_data()

    def train_dataloader(self) -> "DataLoader[Batch]":
        """An element is a process's part of a global batch."""
        if self.dataset is None:
            assert isinstance(self.transform, TextTransform)
            stream = StreamingBatches(self.train, self.transform, self.batch_size, self.seed, self.shuffle_buffer, self._place)
            return DataLoader(stream, batch_size=None)
        assert self.sampler is not None
        sampler = ResumableSampler(self.sampler, self._done)
        return DataLoader(
            self.dataset,  # type: ignore[arg-type]
            batch_size=None,
            sampler=sampler,
            num_workers=self.workers,
            generator=torch.Generator(),  # workers' seeds; training's own draws stay as they are
        )

    def _done(self) -> int:
        """How many batches of the epoch the weights have seen."""
        loop = getattr(self.trainer, "fit_loop", None)
        return loop.epoch_loop.batch_progress.current.processed if loop else 0

    def state_dict(self) -> dict[str, int]:
        """Where a stream is. It begins before Lightning's loops know where they are; rows in memory ask these later."""
        return {"epoch": self.trainer.current_epoch if self.trainer else 0, "done": self._done()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Where a stream goes on."""
        self.epoch, self.skipped = state_dict["epoch"], state_dict["done"]

    def _place(self) -> tuple[int, int]:
        """The epoch that begins, and how many of its batches were had; the next epoch after it begins at 0."""
        place = self.epoch, self.skipped
        self.epoch, self.skipped = self.epoch + 1, 0
        return place

    def val_dataloader(self) -> "DataLoader[Evaluator]":
        """An element is an evaluator."""
        return evaluators(self.validation)

    def fingerprint(self) -> str:
        """Names the training rows and how they were read."""
        return f"{self.train.fingerprint()}-{self.transform.fingerprint(self.columns)}"


def evaluators(members: Sequence[Evaluator]) -> "DataLoader[Evaluator]":
    """A loader whose batches are the evaluators themselves: Lightning's loops then run them."""
    # Bound methods, because Lightning opens dataclasses in a batch to move what is inside.
    calls = [member.__call__ for member in members]
    return DataLoader(calls, batch_size=None, collate_fn=_same, generator=torch.Generator())  # type: ignore[arg-type]


def _same(evaluator: Evaluator) -> Evaluator:
    return evaluator
