"""Exact nearest-neighbor search, and hard negatives found by it."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tercet.errors import require

DEPTH = 32  # neighbors searched beyond those wanted, before searching deeper


def nearest(queries: Tensor, keys: Tensor, k: int, *, own: Tensor | None = None, block: int = 256) -> tuple[Tensor, Tensor]:
    """The k keys of the largest inner product: ``(Q, D), (M, D)`` to scores ``(Q, k)``, falling, and indices ``(Q, k)``.

    ``own (Q,)`` is the index of the key that is the query itself, -1 for none: that key is never found, wherever it would
    rank. Among equal scores the key of the smaller index comes first, on every device. Where fewer than k keys are left
    the rest is -inf and -1; a score of NaN or -inf is never found. Memory: ``block`` x M scores at a time.
    """
    if k < 1 or block < 1:
        raise ValueError(f"k={k} and block={block} must be at least 1")
    scores = queries.new_full((len(queries), k), -torch.inf)
    indices = torch.full((len(queries), k), -1, dtype=torch.long, device=queries.device)
    most = min(k, len(keys))
    for start in range(0, len(queries), block) if most else ():
        rows = slice(start, start + block)
        found = (queries[rows] @ keys.T).nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        if own is not None:
            column = own[rows].to(found.device)
            row = (column >= 0).nonzero().squeeze(1)
            found[row, column[row]] = -torch.inf
        values, index = _top(found, most)
        scores[rows, :most] = values
        indices[rows, :most] = index.masked_fill(values == -torch.inf, -1)
    return scores, indices


def _top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``(b, M)`` to values and indices ``(b, k)``, ties by index: of keys that tie at its end ``topk`` takes any."""
    values, index = scores.topk(min(k + 1, scores.shape[1]), dim=1)
    tied = (values[:, k - 1 : k] == values[:, k:]).any(1).nonzero().squeeze(1)  # none where all keys are taken
    index, order = index[:, :k].sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    index = index.gather(1, order)
    if len(tied):
        full = scores[tied].sort(dim=1, descending=True, stable=True)
        values[tied], index[tied] = full.values[:, :k], full.indices[:, :k]
    return values, index


@dataclass(frozen=True)
class FalseNegativeFilter:
    """Which keys are too similar to be negatives; most often they are positives without a label.

    Those of a cosine above ``max_similarity``, or above (1 - ``relative_margin``) times the anchor's cosine to its positive.
    """

    max_similarity: float = 1.0  # no limit
    relative_margin: float | None = None

    def __post_init__(self) -> None:
        top, margin = self.max_similarity, self.relative_margin
        require(-1 <= top <= 1, f"`max_similarity`={top}: a cosine, from -1 to 1 (1: no limit).")
        good = margin is None or 0 <= margin < 1
        require(good, f"`relative_margin`={margin}: from 0 to below 1; by default there is no margin.")

    def limit(self, positive: Tensor) -> Tensor:
        """``(A,)`` cosines to the positives, NaN where there is none, to the highest that a negative may have."""
        top = torch.full_like(positive, 2.0 if self.max_similarity == 1 else self.max_similarity)
        if self.relative_margin is None:
            return top
        own = positive - self.relative_margin * positive.abs()  # below the cosine also where that is negative
        return torch.minimum(top, own.nan_to_num(2.0))


def hard_negatives(
    anchors: Tensor, keys: Tensor, allowed: Callable[[Tensor, Tensor], Tensor], limit: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """The k nearest keys that are allowed and whose cosine is at most the anchor's limit, searching as deep as necessary.

    Unit vectors ``(A, D), (M, D)``; ``allowed`` takes anchors ``(a,)`` and some keys of each ``(a, m)``, and returns which may
    be negatives; ``limit (A,)``. Returns cosines ``(A, k)``, falling, and indices ``(A, k)``; -inf and -1 for none.
    """
    scores = anchors.new_full((len(anchors), k), -torch.inf)
    indices = torch.full((len(anchors), k), -1, dtype=torch.long)
    left, depth = torch.arange(len(anchors)), min(len(keys), k + DEPTH)
    while len(left) and depth:
        found, at = _search(anchors[left], keys, depth)
        valid = (at >= 0) & (found <= limit[left, None]) & allowed(left, at)
        order = valid.byte().argsort(dim=1, descending=True, stable=True)[:, :k]  # valid ones first, nearest first
        ok = valid.gather(1, order)
        scores[left, : order.shape[1]] = found.gather(1, order).masked_fill(~ok, -torch.inf)
        indices[left, : order.shape[1]] = at.gather(1, order).masked_fill(~ok, -1)
        if depth == len(keys):
            break
        left, depth = left[valid.sum(1) < k], min(len(keys), 4 * depth)
    return scores, indices


def _search(queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """FAISS's exact index where it is installed and all is on the CPU, about 1.6 times as fast as ``nearest``."""
    if queries.device.type != "cpu" or importlib.util.find_spec("faiss") is None:
        return nearest(queries, keys, k)
    import faiss

    index = faiss.IndexFlatIP(keys.shape[1])
    index.add(keys.float().numpy())
    scores, at = index.search(queries.float().numpy(), k)
    return torch.from_numpy(scores).to(queries.dtype), torch.from_numpy(at)
