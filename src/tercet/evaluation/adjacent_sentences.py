"""Adjacent sentences: which sentence is next to this one? The task of Quick-Thoughts, in documents that it has not seen."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from tercet.errors import InputError
from tercet.evaluation.inputs import Rows, as_embeddings, check_source, read_rows
from tercet.messages import warn_once
from tercet.types import EncodeFunction

SIMILARITIES = ("cosine", "dot")


@dataclass(frozen=True)
class AdjacentSentences:
    """Scores each sentence of a ``window`` of consecutive ones against all others of it; the best one is the guess.

    ``num_outputs`` 2: the vector is [f; g], and f of a sentence is scored against g of the others (Logeswaran and Lee 2018,
    arXiv:1803.02893, section 3); 1: the vector against those of the others; by default the model's own number. A sentence
    with the same words as the query is no candidate, unless it is its neighbor. Sentences that fill no window are left out.

    ``adjacent_sentences/<name>/...``: ``forward`` and ``backward``, the share of sentences whose guess is the next one or the
    previous one, of those that have one; ``accuracy``, either of both; ``chance``, the accuracy of a random guess. An encoder
    that cannot tell which of two neighbors is the next one has at most a half of forward and of backward.

    >>> source = {"text": list("abcdef"), "label": [0] * 6, "position": list(range(6))}
    >>> def encode(texts):  # an angle that grows with the position
    ...     angle = np.array([ord(text) for text in texts]) / 10
    ...     return np.stack([np.cos(angle), np.sin(angle)], 1)
    >>> AdjacentSentences(source, window=6)(encode)["adjacent_sentences/documents/accuracy"]
    1.0
    """

    source: Rows
    window: int = 400
    num_outputs: int | None = None
    similarity: str = "dot"
    name: str = "documents"
    needs: ClassVar[frozenset[str]] = frozenset({"label", "position"})

    def __post_init__(self) -> None:
        check_source("adjacent_sentences", self.name, self.source)
        if self.window < 3:
            raise InputError(f"`window`={self.window}: 3 sentences or more.")
        if self.num_outputs not in (None, 1, 2):
            raise InputError(f"`num_outputs`={self.num_outputs}: 1, or 2 where the vector is [f; g]; by default the model's.")
        if self.similarity not in SIMILARITIES:
            raise InputError(f"`similarity`={self.similarity}: choose one of {', '.join(SIMILARITIES)}.")

    def __call__(self, encode: EncodeFunction) -> dict[str, float]:
        """Measure, with one call of ``encode`` with each distinct sentence once."""
        model: Any = getattr(encode, "__self__", encode)  # the model, where this is its method
        available = getattr(model, "num_outputs", None)
        if self.num_outputs == 2 and available == 1:
            raise InputError("`num_outputs`=2, but the model has one output. Use `num_outputs`=1.")
        texts, windows = self._windows()
        unique = sorted({texts[i] for rows in windows for i in rows})
        index = {text: i for i, text in enumerate(unique)}
        z = as_embeddings(encode, unique, f"adjacent_sentences of {self.name}").float()
        f, g = self._outputs(z, self.num_outputs or available or 1)
        hits = torch.zeros(4, dtype=torch.double)
        for rows in windows:
            which = torch.tensor([index[texts[i]] for i in rows])
            hits += _hits(f[which] @ g[which].T, which)
        n, m = len(windows), self.window
        queries = torch.tensor([m - 1, m - 1, m, m], dtype=torch.double) * n  # that have a next, a previous, any
        names = ("forward", "backward", "accuracy", "chance")
        return {f"adjacent_sentences/{self.name}/{name}": float(x) for name, x in zip(names, hits / queries, strict=True)}

    def _outputs(self, z: Tensor, num_outputs: int) -> tuple[Tensor, Tensor]:
        """Split into f and g."""
        if z.shape[1] % num_outputs:
            raise InputError(f"`num_outputs`=2, but the model has {z.shape[1]} columns. Use `num_outputs`=1.")
        f, g = z.chunk(2, 1) if num_outputs == 2 else (z, z)
        return (f, g) if self.similarity == "dot" else (F.normalize(f, dim=1), F.normalize(g, dim=1))

    def _windows(self) -> tuple[list[str], list[npt.NDArray[np.int64]]]:
        """All texts, and the rows of each window."""
        (column, *_), rows = read_rows(self.source)
        if missing := {"label", "position"} - set(rows.column_names):
            raise InputError(
                f"adjacent_sentences of {self.name} needs documents and positions in them, but the source has no "
                f"{' and no '.join(sorted(missing))}. Set `source.label` and `source.position`, or use books."
            )
        label, position = (np.asarray(rows[name][:], dtype=np.int64) for name in ("label", "position"))
        windows = list(_cut_windows(label, position, self.window))
        if not windows:
            raise InputError(f"`window`={self.window}: no document of {self.name} has so many sentences in a row. Use fewer.")
        if left := len(label) - self.window * len(windows):
            warn_once(f"adjacent_sentences of {self.name}: {left} of {len(label)} sentences fill no window of {self.window}.")
        return list(rows[column]), windows


def _cut_windows(label: npt.NDArray[np.int64], position: npt.NDArray[np.int64], size: int) -> Iterator[npt.NDArray[np.int64]]:
    """Windows of rows whose positions follow each other without a gap, document by document."""
    order = np.lexsort((position, label))
    breaks = (np.diff(label[order]) != 0) | (np.diff(position[order]) != 1)
    for run in np.split(order, np.flatnonzero(breaks) + 1):
        if label[run[0]] >= 0 and position[run[0]] >= 0:
            yield from (run[start : start + size] for start in range(0, len(run) - size + 1, size))


def _hits(scores: Tensor, which: Tensor) -> Tensor:
    """Hits forward, backward, either, by chance, of ``scores (m, m)`` of consecutive sentences with contents ``which (m,)``."""
    m = len(scores)
    step = torch.arange(m)[None] - torch.arange(m)[:, None]
    adjacent = step.abs() == 1
    excluded = (which[:, None] == which) & ~adjacent
    best = scores.masked_fill(excluded, -torch.inf).argmax(1, keepdim=True)
    chance = adjacent.sum(1) / (~excluded).sum(1)
    hits = [kind.gather(1, best).sum() for kind in (step == 1, step == -1, adjacent)]
    return torch.stack([*(x.double() for x in hits), chance.double().sum()])
