"""The data module: a source of sentences becomes batches of token ids."""

from collections.abc import Sequence

import pytorch_lightning as pl
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from tercet.contract import Batch, Evaluator, Source
from tercet.data.batches import GlobalBatches
from tercet.data.rows import Tokenizing, TokenRows, tokenized
from tercet.data.stream import StreamBatches
from tercet.error import InputError


class DataModule(pl.LightningDataModule):
    """``train`` gives the rows to learn from.

    ``validation`` is what a validation epoch runs: evaluators in place of batches. ``batch_size`` counts the rows of
    the global batch, over all processes. ``max_length`` cuts training rows, in tokens. With ``train.streaming`` the
    rows are read as they come and shuffled in a buffer of ``shuffle_buffer`` rows.
    """

    def __init__(
        self,
        name: str,
        train: Source,
        validation: Sequence[Evaluator],
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        max_length: int,
        seed: int,
        workers: int,
        cache: str | None,
        shuffle_buffer: int,
    ) -> None:
        super().__init__()
        if batch_size < 2:
            raise InputError(f"data.batch_size={batch_size}: contrast needs at least 2 rows in a batch.")
        if max_length < 3:
            raise InputError(f"data.max_length={max_length}: at least 3 tokens, two of which are special.")
        if workers < 0:
            raise InputError(f"data.workers={workers}: 0 (the main process reads) or more.")
        self.name = name
        self.train = train
        self.validation = list(validation)
        self.batch_size = batch_size
        self.seed = seed
        self.workers = workers
        self.cache = cache
        self.shuffle_buffer = shuffle_buffer
        self.columns = list(train.columns)
        self.streaming = bool(getattr(train, "streaming", False))
        self.tokenizing = Tokenizing(tokenizer, self.columns, max_length)
        self.rows: TokenRows | None = None

    def prepare_data(self) -> None:
        """Check the rows and tokenize them into the cache; asked again, as Lightning does, there is nothing to do."""
        if self.streaming or self.rows is not None:
            return
        rows = tokenized(self.train, self.tokenizing, self.cache)
        if len(rows) < self.batch_size:
            raise InputError(
                f"data.batch_size={self.batch_size}, but data={self.name} has {len(rows)} training rows. "
                f"Use data.batch_size={max(2, len(rows) // 2)} or more data."
            )
        self.rows = TokenRows(rows, len(self.columns))

    def setup(self, stage: str) -> None:
        """Open the cache."""
        if not self.streaming and self.rows is None:
            self.rows = TokenRows(tokenized(self.train, self.tokenizing, self.cache), len(self.columns))

    def train_dataloader(self) -> "DataLoader[Batch]":
        """An element is a process's part of a global batch."""
        if self.rows is None:
            stream = StreamBatches(self.train, self.tokenizing, self.batch_size, self.seed, self.shuffle_buffer)
            return DataLoader(stream, batch_size=None)
        batches = GlobalBatches(len(self.rows), self.batch_size, self.seed)
        return DataLoader(self.rows, batch_size=None, sampler=batches, num_workers=self.workers)  # type: ignore[arg-type]

    def val_dataloader(self) -> "DataLoader[Evaluator]":
        """An element is an evaluator."""
        return evaluators(self.validation)

    def fingerprint(self) -> str:
        """Names the training rows and how they were cut into tokens."""
        return f"{self.train.fingerprint()}-{self.tokenizing.fingerprint()}"


def evaluators(members: Sequence[Evaluator]) -> "DataLoader[Evaluator]":
    """A loader whose batches are the evaluators themselves: Lightning's loops then run them."""
    # Bound methods, because Lightning opens dataclasses in a batch to move what is inside.
    return DataLoader([member.__call__ for member in members], batch_size=None, collate_fn=_same)  # type: ignore[arg-type]


def _same(evaluator: Evaluator) -> Evaluator:
    return evaluator
