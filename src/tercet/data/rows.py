"""Sentences to token ids: once, into a cache on disk that every process and every later run reads."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, Features, List, Value
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tercet.contract import Batch, Ragged, Source
from tercet.paths import writable


def content_hash(text: str) -> int:
    """A signed 64-bit hash of a cell: equal texts are equal, whatever the run."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def cache_folder(cache: str | None) -> Path:
    """``data.cache``, else ``TERCET_CACHE``, else the user's cache folder."""
    return Path(cache or os.environ.get("TERCET_CACHE") or Path.home() / ".cache" / "tercet").expanduser()


class Tokenizing:
    """``rows of text -> rows of token ids``, batched; special tokens included, cut at ``max_length``."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, columns: Sequence[str], max_length: int) -> None:
        self.tokenizer = tokenizer
        self.columns = list(columns)
        self.max_length = max_length

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Per column v: ``ids_v`` and ``content_v``; ``label`` and ``position``, -1 where there is none."""
        size = len(rows[self.columns[0]])
        out = {name: rows.get(name, [-1] * size) for name in ("label", "position")}
        for v, column in enumerate(self.columns):
            texts = rows[column]
            encoded = self.tokenizer(texts, truncation=True, max_length=self.max_length, return_attention_mask=False)
            out[f"ids_{v}"] = encoded["input_ids"]
            out[f"content_{v}"] = [content_hash(text) for text in texts]
        return out

    def features(self) -> Features:
        """The types on disk."""
        types: dict[str, Any] = {"label": Value("int64"), "position": Value("int64")}
        for v in range(len(self.columns)):
            types |= {f"ids_{v}": List(Value("int32")), f"content_{v}": Value("int64")}
        return Features(types)

    def fingerprint(self) -> str:
        """Changes when the ids would."""
        fast = getattr(self.tokenizer, "backend_tokenizer", None)
        if fast is None:
            said = f"{type(self.tokenizer)}{self.tokenizer.name_or_path}"
        else:  # truncation and padding are left in it by the last call, whatever that was
            said = str({k: v for k, v in json.loads(fast.to_str()).items() if k not in ("truncation", "padding")})
        return hashlib.blake2b(f"{said}{self.columns}{self.max_length}".encode(), digest_size=8).hexdigest()


def tokenized(source: Source, tokenizing: Tokenizing, cache: str | None) -> Dataset:
    """The source's rows as token ids, from the cache if they are there."""
    folder = cache_folder(cache)
    path = folder / f"{source.fingerprint()}-{tokenizing.fingerprint()}.arrow"
    if not path.is_file():
        writable(folder, "data.cache")
        rows = source.rows()
        rows.map(
            tokenizing,
            batched=True,
            remove_columns=rows.column_names,
            features=tokenizing.features(),
            cache_file_name=str(path),
            new_fingerprint=path.stem.replace("-", ""),
            desc=f"tokenizing once into {folder}",
        )
    return Dataset.from_file(str(path))


class TokenRows:
    """``list of row numbers -> Batch``, without Python per token."""

    def __init__(self, rows: Dataset, views: int) -> None:
        self.rows = rows.with_format("arrow")
        self.views = views

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, which: list[int]) -> Batch:
        return collate(self.rows[which], torch.tensor(which), self.views)


def collate(table: pa.Table, uid: Tensor, views: int) -> Batch:
    """Tokenized rows as a batch."""
    return Batch(
        views=tuple(_ragged(table[f"ids_{v}"].combine_chunks()) for v in range(views)),
        uid=uid,
        label=_tensor(table["label"]),
        position=_tensor(table["position"]),
        content=torch.stack([_tensor(table[f"content_{v}"]) for v in range(views)]),
    )


def _ragged(column: pa.Array) -> Ragged:
    return Ragged(_tensor(column.flatten()), _tensor(pc.list_value_length(column)))


def _tensor(column: Any) -> Tensor:
    return torch.from_numpy(np.array(np.asarray(column), dtype=np.int64, copy=True))
