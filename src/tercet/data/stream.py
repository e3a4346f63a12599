"""Batches of a stream that does not fit: tokenized as it comes."""

from collections.abc import Callable, Iterator
from itertools import islice

import pyarrow as pa
import torch
from torch.utils.data import IterableDataset

from tercet.contract import Batch, Source
from tercet.data.batches import own_slice
from tercet.data.rows import Tokenizing, collate
from tercet.error import InputError


class StreamBatches(IterableDataset[Batch]):
    """Global batches in the order of the stream, shuffled in a buffer from (seed, epoch) alone, sliced by process.

    Every process reads the whole stream but tokenizes its own rows only, so that the global batch is the same for any
    number of processes. ``uid`` counts rows from the start of the epoch. ``place`` says which epoch begins and how many
    of its batches a run that goes on has had: these are read again, and not tokenized.
    """

    def __init__(
        self, source: Source, tokenizing: Tokenizing, batch_size: int, seed: int, buffer: int,
        place: Callable[[], tuple[int, int]],
    ) -> None:  # fmt: skip
        self.source = source
        self.tokenizing = tokenizing
        self.batch_size = batch_size
        self.seed = seed
        self.buffer = buffer
        self.place = place

    def __iter__(self) -> Iterator[Batch]:
        rows = self.source.rows().shuffle(seed=self.seed, buffer_size=self.buffer)
        epoch, done = self.place()
        rows.set_epoch(epoch)
        start = done * self.batch_size
        stream = islice(rows, start, None)
        own = own_slice(self.batch_size)
        while len(batch := list(islice(stream, self.batch_size))) == self.batch_size:
            mine = batch[own]
            texts = {name: [row[name] for row in mine] for name in mine[0]}
            columns = self.source.columns
            schema = self.tokenizing.features(columns).arrow_schema
            table = pa.Table.from_pydict(self.tokenizing.ids(texts, columns), schema=schema)
            uid = torch.arange(start, start + self.batch_size)[own]
            yield collate(table, uid, len(columns))
            start += self.batch_size
        if start == 0:
            raise InputError(
                f"data.batch_size={self.batch_size}, but the stream ended after {len(batch)} rows. "
                "Use a smaller data.batch_size."
            )
