"""Adjacent sentences: which sentence is next to this one? The task of Quick-Thoughts, in documents that it has not seen."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tercet.errors import InputError, check_choice, require
from tercet.evaluation.inputs import Ints, Rows, as_embeddings, check_source, read_rows
from tercet.messages import warn_once
from tercet.types import EncodeFunction


@dataclass(frozen=True)
class AdjacentSentences:
    """Scores each sentence of a ``window`` of consecutive ones against all others of it; the best one is the guess.

    ``num_outputs`` 2: the vector is [f; g], and f of a sentence is scored against g of the others (Logeswaran and Lee 2018,
    arXiv:1803.02893, section 3); 1: the vector against those of the others; by default the model's own number. A sentence
    with the same words as the query is no candidate, unless it is its neighbor. ``adjacent_sentences/<name>/...``: ``forward``
    and ``backward``, the share of sentences whose guess is the next one or the previous one, of those that have one;
    ``accuracy``, either of both; ``chance``, the accuracy of a random guess.

    >>> source = {"text": list("abcdef"), "label": [0] * 6, "position": list(range(6))}
    >>> encode = lambda texts: np.array([[np.cos(ord(x) / 10), np.sin(ord(x) / 10)] for x in texts])  # an angle that grows
    >>> AdjacentSentences(source, window=6)(encode)["adjacent_sentences/documents/accuracy"]
    1.0
    """

    source: Rows
    window: int = 400
    num_outputs: int | None = None
    similarity: str = "dot"
    name: str = "documents"
    needs: ClassVar[frozenset[str]] = frozenset({"label", "position"})
    smaller_is_better: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        check_source("adjacent_sentences", self.name, self.source)
        require(self.window >= 3, f"`window`={self.window}: 3 sentences or more.")
        if self.num_outputs not in (None, 1, 2):
            raise InputError(f"`num_outputs`={self.num_outputs}: 1, or 2 where the vector is [f; g]; by default the model's.")
        check_choice("similarity", self.similarity, ("cosine", "dot"))

    def __call__(self, encode: EncodeFunction) -> dict[str, float]:
        """Measure, with one call of ``encode``."""
        return {name: float(values.mean()) for name, values in self._measure(encode).items()}

    def examples(self, encode: EncodeFunction) -> dict[str, Tensor]:
        """Whether the guess of each sentence is right, ``(N,)``, whose means ``__call__`` returns; ``chance`` has none."""
        return {name: values for name, values in self._measure(encode).items() if not name.endswith("/chance")}

    def _measure(self, encode: EncodeFunction) -> dict[str, Tensor]:
        """By metric the values of each sentence, window by window."""
        model: Any = getattr(encode, "__self__", encode)  # the model, where this is its method
        available = getattr(model, "num_outputs", None)
        if self.num_outputs == 2 and available == 1:
            raise InputError("`num_outputs`=2, but the model has one output. Use `num_outputs`=1.")
        texts, windows = self._windows()
        unique = sorted({texts[i] for rows in windows for i in rows})
        index = {text: i for i, text in enumerate(unique)}
        z = as_embeddings(encode, unique, f"adjacent_sentences of {self.name}").float()
        num_outputs = self.num_outputs or available or 1
        if z.shape[1] % num_outputs:
            raise InputError(f"`num_outputs`=2, but the model has {z.shape[1]} columns. Use `num_outputs`=1.")
        f, g = z.chunk(2, 1) if num_outputs == 2 else (z, z)
        if self.similarity == "cosine":
            f, g = F.normalize(f, dim=1), F.normalize(g, dim=1)
        rows_of = (torch.tensor([index[texts[i]] for i in rows]) for rows in windows)
        hits = torch.stack([_hits(f[which] @ g[which].T, which) for which in rows_of], 1)  # (4, windows, m)
        found = {"forward": hits[0, :, :-1], "backward": hits[1, :, 1:], "accuracy": hits[2], "chance": hits[3]}
        return {f"adjacent_sentences/{self.name}/{name}": values.flatten() for name, values in found.items()}

    def _windows(self) -> tuple[list[str], list[Ints]]:
        """All texts, and the rows of each window."""
        (column, *_), rows = read_rows(self.source)
        if missing := {"label", "position"} - set(rows.column_names):
            fault = f"needs documents and positions, but the source has no {' and no '.join(sorted(missing))}"
            advice = "Set `source.label` and `source.position`, or use books."
            raise InputError(f"adjacent_sentences of {self.name} {fault}. {advice}")
        label, position = (np.asarray(rows[name][:], dtype=np.int64) for name in ("label", "position"))
        windows: list[Ints] = []
        order = np.lexsort((position, label))
        breaks = (np.diff(label[order]) != 0) | (np.diff(position[order]) != 1)
        for run in np.split(order, np.flatnonzero(breaks) + 1):  # rows whose positions follow each other without a gap
            if label[run[0]] >= 0 and position[run[0]] >= 0:
                starts = range(0, len(run) - self.window + 1, self.window)
                windows += [run[start : start + self.window] for start in starts]
        require(windows, f"`window`={self.window}: no document of {self.name} has so many sentences in a row. Use fewer.")
        if left := len(label) - self.window * len(windows):
            warn_once(f"adjacent_sentences of {self.name}: {left} of {len(label)} sentences fill no window of {self.window}.")
        return list(rows[column]), windows


def _hits(scores: Tensor, which: Tensor) -> Tensor:
    """Hits forward, backward, either, by chance, ``(4, m)``, of ``scores (m, m)`` of sentences with contents ``which (m,)``."""
    m = len(scores)
    step = torch.arange(m) - torch.arange(m)[:, None]
    adjacent = step.abs() == 1
    excluded = (which[:, None] == which) & ~adjacent
    best = scores.masked_fill(excluded, -torch.inf).argmax(1, keepdim=True)
    chance = adjacent.sum(1) / (~excluded).sum(1)
    hits = [kind.gather(1, best).squeeze(1) for kind in (step == 1, step == -1, adjacent)]
    return torch.stack([*hits, chance]).double()
