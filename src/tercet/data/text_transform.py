"""Turn texts into token ids, cached on disk or streamed."""

import hashlib
import json
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import xxhash
from datasets import Dataset, Features, List, Value
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerBase

from tercet.data.samplers import rank_slice
from tercet.errors import require
from tercet.messages import print_status, progress_bar, without_progress_bars
from tercet.paths import atomic_write, cache_folder, check_writable, remove_partials, temporary_folder
from tercet.types import Batch, BatchIndices, Source, TokenBatch

FOOTER = struct.Struct("<8sQ16s")  # after the rows of a cache: MARK, the number of bytes before it, and their XXH3 hash
MARK = b"tercet 1"
FORMAT = 2  # of cached rows: in the first one ``content_v`` was a hash of the text


def content_hash(data: bytes) -> int:
    """A signed 64-bit hash of what the model gets of a cell, the same in every run and process."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


@dataclass(frozen=True)
class TextTransform:
    """Turns rows of text into token ids, with special tokens, of at most ``max_length`` tokens.

    ``prompt`` is put before each text: one for all columns, or a list with one for each.
    The ids of a source are made once and kept in the folder ``cache`` (None: ``TERCET_CACHE``, else ``~/.cache/tercet``).

    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> from transformers import PreTrainedTokenizerFast
    >>> words = Tokenizer(models.WordLevel({"<unk>": 0, "dogs": 1, "run": 2}, unk_token="<unk>"))
    >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
    >>> transform = TextTransform(PreTrainedTokenizerFast(tokenizer_object=words))
    >>> transform.tokenize_rows({"text": ["dogs run", "run"]}, ["text"])["ids_0"]
    [[1, 2], [2]]
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int = 32
    cache: str | None = None
    prompt: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        require(self.max_length >= 3, f"`max_length`={self.max_length}: at least 3 tokens, two of which are special.")

    def load(self, source: Source) -> "TokenRows":
        """The source's rows as token ids; they are read from the cache if they are there."""
        folder, columns = cache_folder(self.cache), list(source.columns)
        path = folder / f"{source.fingerprint()}-{self.fingerprint(columns)}.arrow"
        fault = find_fault(path) if path.is_file() else None
        if fault:
            print_status(f"{path} {fault}; the texts are tokenized again.")
        if fault or not path.is_file():
            check_writable(folder, "cache")
            remove_partials(folder)
            with temporary_folder(folder) as made, atomic_write(path) as partial:
                self._tokenize(source.rows(), columns, made / path.name, f"tokenizing once into {folder}")
                seal(made / path.name)
                (made / path.name).replace(partial)
        return TokenRows(Dataset.from_file(str(path)), len(columns))

    def _tokenize(self, rows: Any, columns: list[str], path: Path, description: str) -> None:
        def tokenize(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
            bar.update(len(batch[columns[0]]))
            return self.tokenize_rows(batch, columns)

        with progress_bar(description, len(rows), "rows") as bar, without_progress_bars():  # theirs is a bar in a log file, too
            rows.map(
                tokenize,
                batched=True,
                remove_columns=rows.column_names,
                features=self.features(columns),
                cache_file_name=str(path),
                new_fingerprint=path.stem.replace("-", ""),
            )

    def tokenize_rows(self, rows: dict[str, list[Any]], columns: Sequence[str]) -> dict[str, list[Any]]:
        """For each column v ``ids_v`` and their hash ``content_v``; ``label`` and ``position``, -1 where there is none.

        Texts that differ only in what the tokenizer drops (case, what is cut off) are the same input, with the same hash.
        """
        size, prompts = len(rows[columns[0]]), self.prompts(columns)
        out = {name: rows.get(name, [-1] * size) for name in ("label", "position")}
        for v, column in enumerate(columns):
            texts = [prompts[v] + text for text in rows[column]] if prompts[v] else rows[column]
            encoded = self.tokenizer(texts, truncation=True, max_length=self.max_length, return_attention_mask=False)
            out[f"ids_{v}"] = encoded["input_ids"]
            out[f"content_{v}"] = [content_hash(np.array(ids, dtype="<i4").tobytes()) for ids in encoded["input_ids"]]
        return out

    def prompts(self, columns: Sequence[str]) -> list[str]:
        """The prompt of each column; ``InputError`` unless there is one for all, or one for each."""
        if self.prompt is None or isinstance(self.prompt, str):
            return [self.prompt or ""] * len(columns)
        fault = f"`prompt` has {len(self.prompt)} texts, and the rows {len(columns)} columns ({', '.join(columns)})"
        require(len(self.prompt) == len(columns), f"{fault}. Give one for each, or one text for all.")
        return list(self.prompt)

    def features(self, columns: Sequence[str]) -> Features:
        """The types of the columns in the cache."""
        types: dict[str, Any] = {"label": Value("int64"), "position": Value("int64")}
        for v in range(len(columns)):
            types |= {f"ids_{v}": List(Value("int32")), f"content_{v}": Value("int64")}
        return Features(types)

    def fingerprint(self, columns: Sequence[str]) -> str:
        """A hash of everything that the ids depend on besides the texts."""
        fast = getattr(self.tokenizer, "backend_tokenizer", None)
        if fast is None:
            state = f"{type(self.tokenizer)}{self.tokenizer.name_or_path}"
        else:  # truncation and padding are those of the tokenizer's last call
            state = str({k: v for k, v in json.loads(fast.to_str()).items() if k not in ("truncation", "padding")})
        prompts = f"{self.prompts(columns)}" if self.prompt else ""
        return hashlib.blake2b(f"{FORMAT}{state}{list(columns)}{self.max_length}{prompts}".encode(), digest_size=8).hexdigest()


def seal(path: Path) -> None:
    """Append the length of a file and a hash of its content to it; readers of Arrow streams do not read that far."""
    size = path.stat().st_size
    content = FOOTER.pack(MARK, size, _hash(path, size))
    with path.open("ab") as file:
        file.write(content)


def find_fault(path: Path) -> str | None:
    """What is wrong with a sealed file, or None; it is read once, at some gigabytes a second."""
    size = path.stat().st_size - FOOTER.size
    with path.open("rb") as file:
        file.seek(max(0, size))
        footer = file.read(FOOTER.size)
    mark, length, digest = FOOTER.unpack(footer) if size >= 0 else (b"", 0, b"")
    if mark != MARK or length != size:
        return "is incomplete, or of an earlier version"
    return None if digest == _hash(path, size) else "is not as it was written"


def _hash(path: Path, size: int) -> bytes:
    found = xxhash.xxh3_128()
    with path.open("rb") as file:
        while size and (part := file.read(min(size, 1 << 22))):
            found.update(part)
            size -= len(part)
    return found.digest()


class TokenRows:
    """The dataset of a source's token ids: ``dataset[indices]`` is a batch, made without Python code per token."""

    def __init__(self, rows: Dataset, num_views: int) -> None:
        self.rows, self.num_views = rows.with_format("arrow"), num_views

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

    @property
    def content_hash(self) -> Tensor:
        """``(V, N)``, equal for equal texts."""
        return torch.stack([_tensor(self.rows[f"content_{v}"][:]) for v in range(self.num_views)])

    def __getitem__(self, indices: BatchIndices) -> Batch:
        return collate(self.rows[indices.rows], torch.tensor(indices.rows), self.num_views)


def collate(table: pa.Table, example_id: Tensor, num_views: int) -> Batch:
    """Make a batch of rows of token ids."""
    ids = [table[f"ids_{v}"].combine_chunks() for v in range(num_views)]
    return Batch(
        views=tuple(TokenBatch(_tensor(rows.flatten()), _tensor(pc.list_value_length(rows))) for rows in ids),
        example_id=example_id,
        label=_tensor(table["label"]),
        position=_tensor(table["position"]),
        content_hash=torch.stack([_tensor(table[f"content_{v}"]) for v in range(num_views)]),
    )


def _tensor(column: Any) -> Tensor:
    return torch.from_numpy(np.array(np.asarray(column), dtype=np.int64, copy=True))


@dataclass(eq=False)
class StreamingBatches(IterableDataset[Batch]):
    """Batches in the order of a stream, shuffled in a buffer of ``buffer_size`` rows by (``seed``, epoch).

    Every process reads the whole stream but tokenizes only its own rows of each global batch of ``batch_size`` rows, so that
    the global batch is the same for any number of processes. ``example_id`` counts rows from the start of the epoch.
    ``start()`` gives the epoch and the number of its batches that a resumed run has had already; their rows are read again
    but not tokenized.
    """

    source: Source
    transform: TextTransform
    batch_size: int
    seed: int
    buffer_size: int
    start: Callable[[], tuple[int, int]]

    def __iter__(self) -> Iterator[Batch]:
        rows = self.source.rows().shuffle(seed=self.seed, buffer_size=self.buffer_size)
        epoch, done = self.start()
        rows.set_epoch(epoch)
        first = done * self.batch_size
        stream = islice(rows, first, None)
        own, columns = rank_slice(self.batch_size), self.source.columns
        schema = self.transform.features(columns).arrow_schema
        while len(batch := list(islice(stream, self.batch_size))) == self.batch_size:
            texts = {name: [row[name] for row in batch[own]] for name in batch[0]}
            table = pa.Table.from_pydict(self.transform.tokenize_rows(texts, columns), schema=schema)
            yield collate(table, torch.arange(first, first + self.batch_size)[own], len(columns))
            first += self.batch_size
        advice = "Use a smaller `batch_size`."
        require(first, f"`batch_size`={self.batch_size}, but the stream ended after {len(batch)} rows. {advice}")
