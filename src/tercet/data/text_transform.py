"""Texts to token ids: cached on disk, or streamed."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, Features, List, Value
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerBase

from tercet.data.samplers import rank_slice
from tercet.errors import InputError
from tercet.paths import check_writable
from tercet.types import Batch, BatchIndices, Source, TokenBatch


def content_hash(cell: str | bytes) -> int:
    """A signed 64-bit hash of a cell: equal cells are equal, whatever the run."""
    data = cell.encode() if isinstance(cell, str) else cell
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


def cache_folder(cache: str | None) -> Path:
    """``data.cache``, else ``TERCET_CACHE``, else the user's cache folder."""
    return Path(cache or os.environ.get("TERCET_CACHE") or Path.home() / ".cache" / "tercet").expanduser()


@dataclass(frozen=True)
class TextTransform:
    """Reads rows of text as token ids, special tokens included, cut at ``max_length``; ``cache`` is a folder."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    cache: str | None

    def __post_init__(self) -> None:
        if self.max_length < 3:
            raise InputError(f"data.max_length={self.max_length}: at least 3 tokens, two of which are special.")

    def load(self, source: Source) -> "TokenRows":
        """The source's rows as token ids, from the cache if they are there."""
        folder, columns = cache_folder(self.cache), list(source.columns)
        path = folder / f"{source.fingerprint()}-{self.fingerprint(columns)}.arrow"
        if not path.is_file():
            check_writable(folder, "data.cache")
            rows = source.rows()
            rows.map(
                self.tokenize_rows,
                fn_kwargs={"columns": columns},
                batched=True,
                remove_columns=rows.column_names,
                features=self.features(columns),
                cache_file_name=str(path),
                new_fingerprint=path.stem.replace("-", ""),
                desc=f"tokenizing once into {folder}",
            )
        return TokenRows(Dataset.from_file(str(path)), len(columns))

    def tokenize_rows(self, rows: dict[str, list[Any]], columns: Sequence[str]) -> dict[str, list[Any]]:
        """Per column v: ``ids_v`` and ``content_v``; ``label`` and ``position``, -1 where there is none."""
        size = len(rows[columns[0]])
        out = {name: rows.get(name, [-1] * size) for name in ("label", "position")}
        for v, column in enumerate(columns):
            texts = rows[column]
            encoded = self.tokenizer(texts, truncation=True, max_length=self.max_length, return_attention_mask=False)
            out[f"ids_{v}"] = encoded["input_ids"]
            out[f"content_{v}"] = [content_hash(text) for text in texts]
        return out

    def features(self, columns: Sequence[str]) -> Features:
        """The types on disk."""
        types: dict[str, Any] = {"label": Value("int64"), "position": Value("int64")}
        for v in range(len(columns)):
            types |= {f"ids_{v}": List(Value("int32")), f"content_{v}": Value("int64")}
        return Features(types)

    def fingerprint(self, columns: Sequence[str]) -> str:
        """Changes when the ids would."""
        fast = getattr(self.tokenizer, "backend_tokenizer", None)
        if fast is None:
            said = f"{type(self.tokenizer)}{self.tokenizer.name_or_path}"
        else:  # truncation and padding are left in it by the last call, whatever that was
            said = str({k: v for k, v in json.loads(fast.to_str()).items() if k not in ("truncation", "padding")})
        return hashlib.blake2b(f"{said}{list(columns)}{self.max_length}".encode(), digest_size=8).hexdigest()


class TokenRows:
    """``draw -> Batch``, without Python per token."""

    def __init__(self, rows: Dataset, views: int) -> None:
        self.rows = rows.with_format("arrow")
        self.views = views

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def label(self) -> Tensor:
        """``(N,)``, -1 where there is none."""
        return _tensor(self.rows["label"][:])

    @property
    def position(self) -> Tensor:
        """``(N,)``, -1 where there is none."""
        return _tensor(self.rows["position"][:])

    def __getitem__(self, draw: BatchIndices) -> Batch:
        return collate(self.rows[draw.rows], torch.tensor(draw.rows), self.views)


def collate(table: pa.Table, uid: Tensor, views: int) -> Batch:
    """Tokenized rows as a batch."""
    return Batch(
        views=tuple(_ragged(table[f"ids_{v}"].combine_chunks()) for v in range(views)),
        example_id=uid,
        label=_tensor(table["label"]),
        position=_tensor(table["position"]),
        content_hash=torch.stack([_tensor(table[f"content_{v}"]) for v in range(views)]),
    )


def _ragged(column: pa.Array) -> TokenBatch:
    return TokenBatch(_tensor(column.flatten()), _tensor(pc.list_value_length(column)))


def _tensor(column: Any) -> Tensor:
    return torch.from_numpy(np.array(np.asarray(column), dtype=np.int64, copy=True))


class StreamingBatches(IterableDataset[Batch]):
    """Global batches in the order of the stream, shuffled in a buffer from (seed, epoch) alone, sliced by process.

    Every process reads the whole stream but tokenizes its own rows only, so that the global batch is the same for any
    number of processes. ``uid`` counts rows from the start of the epoch. ``place`` says which epoch begins and how many
    of its batches a run that goes on has had: these are read again, and not tokenized.
    """

    def __init__(
        self, source: Source, tokenizing: TextTransform, batch_size: int, seed: int, buffer: int,
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
        own = rank_slice(self.batch_size)
        while len(batch := list(islice(stream, self.batch_size))) == self.batch_size:
            mine = batch[own]
            texts = {name: [row[name] for row in mine] for name in mine[0]}
            columns = self.source.columns
            schema = self.tokenizing.features(columns).arrow_schema
            table = pa.Table.from_pydict(self.tokenizing.tokenize_rows(texts, columns), schema=schema)
            uid = torch.arange(start, start + self.batch_size)[own]
            yield collate(table, uid, len(columns))
            start += self.batch_size
        if start == 0:
            raise InputError(
                f"data.batch_size={self.batch_size}, but the stream ended after {len(batch)} rows. "
                "Use a smaller data.batch_size."
            )
