"""Batches of a stream that does not fit: tokenized as it comes."""

from collections.abc import Iterator
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
    number of processes. ``uid`` counts rows from the start of the epoch.
    """

    def __init__(self, source: Source, tokenizing: Tokenizing, batch_size: int, seed: int, buffer: int) -> None:
        self.source = source
        self.tokenizing = tokenizing
        self.batch_size = batch_size
        self.seed = seed
        self.buffer = buffer
        self.epoch = 0

    def __iter__(self) -> Iterator[Batch]:
        rows = self.source.rows().shuffle(seed=self.seed, buffer_size=self.buffer)
        rows.set_epoch(self.epoch)
        self.epoch += 1
        stream, start = iter(rows), 0
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
