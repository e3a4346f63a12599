"""Which triplets count: exact rules on sorted distances, without a tensor of triplets."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tercet.types import runs_on_cpu

ONE_NEGATIVE = ("semihard", "easy_positive", "batch_hard")  # a mined pair (a, p) gets one negative
MININGS = (*ONE_NEGATIVE, "all_semihard", "hard", "all")  # the last three: every negative of a window of distances
GPU_CHUNK = 1 << 26  # numbers that the windows of softplus make at once on a GPU; on a CPU those of one positive
CHUNK = 1 << 20  # triplets that ``expand_triplets`` makes at once
Counts = tuple[Tensor, Tensor, Tensor]  # scalars in float64: counts of triplets exceed 2^24


@dataclass(frozen=True)
class Tile:
    """R anchors with K positives at most and M keys; squared distances, infinite where there is none.

    ``negative (R, M)`` ascends along a row, ``positive (R, K)`` is in no order; ``positive_key`` and ``negative_key`` are the
    indices of their keys. ``num_negatives (R, 1)`` counts the finite ones.
    """

    positive: Tensor
    positive_key: Tensor
    negative: Tensor
    negative_key: Tensor
    num_negatives: Tensor


def mine_tile(tile: Tile, mining: str, fallback: bool, margin: float, soft: bool) -> tuple[Counts, Tensor]:
    """Apply a rule of ``MININGS``; the loss of a triplet is f(d_ap - d_an + margin), f the hinge or, ``soft``, softplus.

    Returns the loss's sum, the numbers of active triplets and of mined pairs; and the derivative by distance, ``(R, M)``.
    """
    if mining in ONE_NEGATIVE:
        return _sum_one_negative(tile, mining, fallback, margin, soft)
    low, high = _window(tile, mining, margin, soft)
    loss_sum, pull, push = (_sum_soft_windows if soft else _sum_windows)(tile, low, high, margin)
    weight = torch.zeros_like(push).scatter_(1, tile.negative_key, -push).scatter_add_(1, tile.positive_key, pull)
    return (loss_sum, _total(high - low), _total(tile.positive < torch.inf)), weight


def _total(x: Tensor) -> Tensor:
    return x.sum(dtype=torch.float64)


def expand_triplets(tile: Tile, mining: str, fallback: bool, margin: float, soft: bool) -> Iterator[Tensor]:
    """The active triplets of ``mine_tile`` as rows of the tile and two keys, ``(3, t)``, about ``CHUNK`` of them at a time."""
    if mining in ONE_NEGATIVE:
        key, _, low, _, active = _pick_negative(tile, mining, fallback, margin, soft)
        high = low + active
    else:
        key, (low, high) = tile.positive_key, _window(tile, mining, margin, soft)
    count, low, key = (high - low).flatten(), low.flatten(), key.reshape(-1)
    pairs = count.nonzero()[:, 0]
    chunk = (count[pairs].cumsum(0) - 1) // CHUNK
    for part in pairs.split(chunk.unique_consecutive(return_counts=True)[1].tolist()):
        n = count[part]
        pair = torch.repeat_interleave(part, n)
        place = low[pair] + torch.arange(len(pair), device=n.device) - torch.repeat_interleave(n.cumsum(0) - n, n)
        row = pair // high.shape[1]
        yield torch.stack([row, key[pair], tile.negative_key[row, place]])


def _pick_negative(tile: Tile, mining: str, fallback: bool, margin: float, soft: bool) -> tuple[Tensor, ...]:
    """The closest negative strictly beyond the positive; with ``fallback`` the farthest where there is none.

    Each ``(R, K')``: the positive's key, whether it is a pair, its negative's place in the sorted ones, d_ap - d_an + margin,
    and whether the triplet is active.
    """
    if mining == "batch_hard":
        last = tile.positive.masked_fill(tile.positive.isinf(), -torch.inf).argmax(1, keepdim=True)
        positive, key, place = tile.positive.gather(1, last), tile.positive_key.gather(1, last), torch.zeros_like(last)
    else:
        positive, key = tile.positive, tile.positive_key
        if mining == "easy_positive":
            positive, first = positive.min(1, keepdim=True)
            key = key.gather(1, first)
        place = torch.searchsorted(tile.negative, positive, right=True)
    is_pair = positive < torch.inf
    found = is_pair & (tile.num_negatives > 0)
    if mining != "batch_hard" and not fallback:
        found &= place < tile.num_negatives
    place = torch.minimum(place, tile.num_negatives - 1).clamp(min=0)  # the clamp is the fallback
    gap = (positive - tile.negative.gather(1, place) + margin).masked_fill(~found, 0)
    return key, is_pair, place, gap, found if soft else gap > 0


def _sum_one_negative(tile: Tile, mining: str, fallback: bool, margin: float, soft: bool) -> tuple[Counts, Tensor]:
    key, is_pair, place, gap, active = _pick_negative(tile, mining, fallback, margin, soft)
    loss = torch.nn.functional.softplus(gap) if soft else gap
    slope = torch.where(active, torch.sigmoid(gap) if soft else 1.0, 0.0).to(gap.dtype)
    weight = tile.negative.new_zeros(tile.negative.shape)
    weight.scatter_add_(1, tile.negative_key.gather(1, place), -slope).scatter_add_(1, key, slope)
    return (_total(loss.masked_fill(~active, 0)), _total(active), _total(is_pair)), weight


def _window(tile: Tile, mining: str, margin: float, soft: bool) -> tuple[Tensor, Tensor]:
    """``[low, high) (R, K)`` of the sorted negatives for every positive; empty where there is no positive."""
    beyond = torch.searchsorted(tile.negative, tile.positive, right=True)  # the first with d_an > d_ap
    inside = torch.searchsorted(tile.negative, tile.positive + margin)  # the first with d_an >= d_ap + margin
    low = beyond if mining == "all_semihard" else torch.zeros_like(beyond)
    if mining == "hard":
        high = beyond if soft else torch.minimum(beyond, inside)  # without a margin, a tie has no loss
    else:
        high = tile.num_negatives.expand_as(beyond) if mining == "all" and soft else inside
    none = ~(tile.positive < torch.inf)  # so that NaN is none
    return low.masked_fill(none, 0), torch.minimum(high, tile.num_negatives).masked_fill(none, 0)


def _sum_windows(tile: Tile, low: Tensor, high: Tensor, margin: float) -> tuple[Tensor, Tensor, Tensor]:
    """The hinge's sum and its slopes by ``positive`` and, negated, by ``negative``: linear, so that counting is enough."""
    count = (high - low).to(tile.positive.dtype)
    one = (tile.positive < torch.inf).to(count.dtype)
    edges = count.new_zeros(len(count), tile.negative.shape[1] + 1)
    edges.scatter_add_(1, low, one).scatter_add_(1, high, -one)
    covered = edges[:, :-1].cumsum(1)  # in how many windows each negative is
    plus = (count * tile.positive.nan_to_num(posinf=0.0)).sum(1).double()
    minus = (covered * tile.negative.nan_to_num(posinf=0.0)).sum(1).double()
    return (plus - minus).sum() + margin * _total(high - low), count, covered


def _sum_soft_windows(tile: Tile, low: Tensor, high: Tensor, margin: float) -> tuple[Tensor, Tensor, Tensor]:
    """The same of softplus, not linear: all negatives with a few of the K positives at a time, in O(R·M) memory."""
    place = torch.arange(tile.negative.shape[1], device=low.device)
    negative, positive = (x.nan_to_num(posinf=0.0) for x in (tile.negative, tile.positive))
    covered, slopes, total = torch.zeros_like(negative), [], negative.new_zeros((), dtype=torch.float64)
    step = 1 if runs_on_cpu(negative.device) else max(1, GPU_CHUNK // max(1, negative.numel()))
    for first, end, near in zip(*(x.split(step, 1) for x in (low, high, positive)), strict=True):
        left_out = (place < first[:, :, None]) | (place >= end[:, :, None])
        gap = near[:, :, None] - negative[:, None] + margin
        total = total + torch.nn.functional.softplus(gap).masked_fill_(left_out, 0).sum(2).sum(dtype=torch.float64)
        slope = gap.sigmoid_().masked_fill_(left_out, 0)
        covered += slope.sum(1)
        slopes.append(slope.sum(2))
    return total, torch.cat(slopes, 1), covered
