"""What a server does with a model: vectors of texts and token ids in common batches, similarity, and search in an index."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import normalize

from tercet.errors import require
from tercet.models import CachedEncoder, Encoder
from tercet.serving.batching import Batcher
from tercet.types import TokenBatch

Vector = NDArray[np.float32]
TOKENS = 2048  # of one pass on a CPU, as in Encoder.encoding_chunks
QUERY = 0  # the column of pairs whose prompt a query is encoded with


@dataclass(frozen=True)
class Limits:
    """The largest requests that are answered: ``body`` in bytes, ``texts`` of one request, ``characters`` of one text.

    ``queue`` is how many texts of all clients may wait; ``connections`` how many clients may be connected; ``seconds`` how
    long a body may take to arrive, and how long a stopping server waits for requests that have arrived.

    >>> Limits(texts=16).texts
    16
    """

    body: int = 4 << 20
    texts: int = 2048
    characters: int = 100_000
    queue: int = 8192
    connections: int = 512
    seconds: int = 60

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            require(type(value) is int and value >= 1, f"`{name}`={value}: a whole number of 1 or more is needed.")
        require(self.texts <= self.queue, f"`texts`={self.texts}: more than `queue`={self.queue} can hold.")


@dataclass(frozen=True)
class Row:
    """A text, or its token ids; ``column`` chooses the prompt, None is the model's default."""

    text: str | tuple[int, ...]
    column: int | None = None


@dataclass(frozen=True)
class Embedded:
    """The vector ``(D,)`` of a row, and the number of its tokens, special ones included; 0 for a query."""

    vector: Vector
    tokens: int


class Service:
    """A model of texts, and an index or None, for an event loop: one thread encodes what all callers await."""

    def __init__(
        self, model: Encoder, index: Any = None, limits: Limits | None = None, latency_ms: float = 5.0,
        observe: Callable[[int, float], Any] = lambda rows, seconds: None, waiting: Callable[[int], Any] = lambda change: None,
    ) -> None:  # fmt: skip
        tokenizer = getattr(model, "tokenizer", None)
        require(tokenizer is not None, "`model`: a model of texts is needed; this one reads images.")
        require(0 <= latency_ms <= 10_000, f"`latency_ms`={latency_ms}: milliseconds from 0 to 10000 are needed.")
        self.model, self.index, self.limits = model, index, limits or Limits()
        part: Any = next(iter(model.text_parts()), model)
        self.max_length, self.vocabulary = int(part.max_length), len(tokenizer)  # type: ignore[arg-type]
        self.dim, self.truncates = model.dim, truncates(model)
        self.batcher: Batcher[Row, Embedded] = Batcher(
            self._encode, latency_ms / 1000, queue=self.limits.queue, observe=observe, waiting=waiting
        )

    def warm_up(self) -> None:
        """Encode a text and search with it, so that the first client does not wait for memory and threads."""
        (found,) = self.batcher.submit([Row("A man plays.", QUERY)]).result()
        if self.index is not None:
            self.index.search(found.vector[None], 1)

    async def embed(self, rows: Sequence[Row]) -> list[Embedded]:
        """The vectors of rows; raises ``QueueFullError``."""
        return await asyncio.wrap_future(self.batcher.submit(rows))

    async def vectors(self, texts: Sequence[str], column: int | None = None) -> Vector:
        """``(N, D)``; raises ``QueueFullError``."""
        return np.stack([row.vector for row in await self.embed([Row(text, column) for text in texts])])

    async def search(self, queries: Sequence[str], k: int) -> list[list[dict[str, Any]]]:
        """For each query the ``k`` nearest rows of the index: their row, score and text."""
        scores, rows = await asyncio.to_thread(self.index.search, await self.vectors(queries, QUERY), k)
        return [self.hits(*found) for found in zip(scores, rows, strict=True)]

    def hits(self, scores: Sequence[float], rows: Sequence[int]) -> list[dict[str, Any]]:
        """Rows of the index with their texts; an approximate index may have found fewer, whose rows are -1."""
        found = [(float(score), int(row)) for score, row in zip(scores, rows, strict=True) if row >= 0]
        texts = self.index.texts([row for _, row in found])
        return [{"row": row, "score": score, "text": text} for (score, row), text in zip(found, texts, strict=True)]

    def _encode(self, rows: list[Row]) -> list[Embedded]:
        results: list[Embedded | None] = [None] * len(rows)
        groups: dict[tuple[bool, int | None], list[int]] = {}
        for i, row in enumerate(rows):
            groups.setdefault((isinstance(row.text, str), row.column), []).append(i)
        for (is_text, column), at in groups.items():
            texts: list[Any] = [rows[i].text for i in at]
            if is_text:
                vectors, tokens = self._texts(texts, column)
            else:
                vectors, tokens = self._run(TokenBatch.from_lists(texts)), [len(row) for row in texts]
            for i, vector, count in zip(at, vectors, tokens, strict=True):
                results[i] = Embedded(vector, count)
        return results  # type: ignore[return-value]

    def _texts(self, texts: list[str], column: int | None) -> tuple[Vector, list[int]]:
        if column is not None:
            encode = CachedEncoder(self.model, distributed=False).for_column(column)
            return encode(texts).numpy(), [0] * len(texts)
        unique = {text: i for i, text in enumerate(dict.fromkeys(texts))}  # equal texts are encoded once
        inputs, at = self.model.prepare(list(unique)), [unique[text] for text in texts]
        return self._run(inputs)[at], inputs.lengths[at].tolist()

    @torch.no_grad()
    def _run(self, inputs: TokenBatch) -> Vector:
        execution = replace(self.model.execution, chunk_tokens=TOKENS, graphs=False)
        return self.model.run(inputs.to(self.model.device), execution).float().cpu().numpy()


def truncates(model: Encoder) -> bool:
    """Whether the model's files say that its vectors may be cut: trained so that the first columns do."""
    heads = [part.head.settings() for part in model.parts()]
    return any(layer["type"] == "Truncate" for head in heads for layer in head.get("layers", ()))


def shorten(vector: Vector, dimensions: int | None) -> Vector:
    """The first ``dimensions`` columns, scaled to the length that the vector had."""
    if dimensions is None or dimensions == len(vector):
        return vector
    short = torch.from_numpy(vector[:dimensions].copy())
    return (normalize(short, dim=0) * float(np.linalg.norm(vector))).numpy()


def cosines(first: Vector, second: Vector) -> Vector:
    """``(N, D)`` and ``(M, D)`` to ``(N, M)``."""
    return (normalize(torch.from_numpy(first), dim=1) @ normalize(torch.from_numpy(second), dim=1).T).numpy()
