"""Which sentence stands beside this one? What Quick-Thoughts is trained on, in documents that it has not seen."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from tercet.errors import InputError
from tercet.evaluation.inputs import check_source
from tercet.messages import warn_once
from tercet.types import EncodeFunction, Source

SIDES = (1, 2)
SIMILARITIES = ("cosine", "dot")


@dataclass(frozen=True)
class AdjacentSentences:
    """Each sentence of a ``window`` of consecutive ones is scored against all others of it; the best one is the guess.

    ``sides`` null: as many as the model says it has. 2: the vector is [f; g], and f of a sentence is scored against g of
    the others (Logeswaran and Lee 2018, arXiv:1803.02893, section 3); 1: the vector against those of the others. A
    sentence that repeats the asked one's words is no candidate, unless it is its neighbour. What fills no window is left
    out.

    ``adjacent_sentences/<name>/...``: ``forward`` and ``backward``, the share of sentences whose guess is the next one or the
    one before, of those that have such a one; ``accuracy``, any of both; ``chance``, the same of a guess at random. An
    encoder that cannot tell which of two neighbours is the next one has at most a half of forward and of backward.
    """

    name: str
    source: Source
    window: int
    num_outputs: int | None
    similarity: str

    def __post_init__(self) -> None:
        check_source("adjacent_sentences", self.name, self.source)
        if self.window < 3:
            raise InputError(f"evaluation.window={self.window}: 3 sentences or more.")
        if self.num_outputs is not None and self.num_outputs not in SIDES:
            raise InputError(f"evaluation.num_outputs={self.num_outputs}: 1, 2 where the vector is [f; g], or null.")
        if self.similarity not in SIMILARITIES:
            raise InputError(f"evaluation.similarity={self.similarity}: choose one of {', '.join(SIMILARITIES)}.")

    def __call__(self, encode: EncodeFunction) -> dict[str, float]:
        """All metrics, from one call of ``encode`` with each distinct sentence once."""
        has = getattr(encode, "num_outputs", None)
        if self.num_outputs == 2 and has == 1:
            raise InputError("evaluation.num_outputs=2, but the model has one side. Use evaluation.num_outputs=null.")
        sides = self.num_outputs or has or 1
        texts, windows = self._windows()
        asked = sorted({texts[i] for rows in windows for i in rows})
        place = {text: i for i, text in enumerate(asked)}
        z = encode(asked).float()
        if not z.isfinite().all():
            raise InputError(f"adjacent_sentences of {self.name}: an embedding is not finite. Use another checkpoint.")
        if z.shape[1] % sides:
            raise InputError(f"evaluation.num_outputs=2, but the model has {z.shape[1]} columns. Use evaluation.num_outputs=1.")
        f, g = z.chunk(2, 1) if sides == 2 else (z, z)
        if self.similarity == "cosine":
            f, g = F.normalize(f, dim=1), F.normalize(g, dim=1)
        hits = torch.zeros(4, dtype=torch.double)
        for rows in windows:
            which = torch.tensor([place[texts[i]] for i in rows])
            hits += _hits(f[which] @ g[which].T, which)
        n, m = len(windows), self.window
        ends = torch.tensor([m - 1, m - 1, m, m], dtype=torch.double) * n
        names = ("forward", "backward", "accuracy", "chance")
        return {f"adjacent_sentences/{self.name}/{name}": float(x) for name, x in zip(names, hits / ends, strict=True)}

    def _windows(self) -> tuple[list[str], list[npt.NDArray[np.int64]]]:
        """All texts, and the rows of each window."""
        rows = self.source.rows()
        if missing := {"label", "position"} - set(rows.column_names):
            raise InputError(
                f"adjacent_sentences of {self.name} needs documents and places in them, but the source has no "
                f"{' and no '.join(sorted(missing))}. Set data.label and data.position, or use data=books."
            )
        label, position = (np.asarray(rows[name][:], dtype=np.int64) for name in ("label", "position"))
        windows = list(_cut(label, position, self.window))
        if not windows:
            raise InputError(
                f"evaluation.window={self.window} (test.window in training): no document of {self.name} has so many "
                "sentences without a gap between their places. Use a smaller one."
            )
        if left := len(label) - self.window * len(windows):
            warn_once(f"adjacent_sentences of {self.name}: {left} of {len(label)} sentences fill no window of {self.window}.")
        return list(rows[self.source.columns[0]]), windows


def _cut(label: npt.NDArray[np.int64], position: npt.NDArray[np.int64], size: int) -> Iterator[npt.NDArray[np.int64]]:
    """Windows of rows whose places follow each other without a gap, document by document."""
    order = np.lexsort((position, label))
    breaks = (np.diff(label[order]) != 0) | (np.diff(position[order]) != 1)
    for run in np.split(order, np.flatnonzero(breaks) + 1):
        if label[run[0]] >= 0 and position[run[0]] >= 0:
            yield from (run[start : start + size] for start in range(0, len(run) - size + 1, size))


def _hits(scores: Tensor, which: Tensor) -> Tensor:
    """``scores (m, m)`` of consecutive sentences, ``which (m,)`` their contents: hits forward, backward, any, by chance."""
    m = len(scores)
    step = torch.arange(m)[None] - torch.arange(m)[:, None]
    near = step.abs() == 1
    out = (which[:, None] == which) & ~near
    best = scores.masked_fill(out, -torch.inf).argmax(1, keepdim=True)
    chance = near.sum(1) / (~out).sum(1)
    hits = [kind.gather(1, best).sum() for kind in (step == 1, step == -1, near)]
    return torch.stack([*(x.double() for x in hits), chance.double().sum()])
