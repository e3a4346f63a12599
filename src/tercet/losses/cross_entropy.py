"""Cross entropy of keys under masks, and its gradient: a tile of anchors at a time, so that no n x N matrix is kept.

Nothing is read from the device and no shape depends on data. The gradient is computed with the loss, so that each tile is made
once; where other blocks of keys are needed first, the tiles are made again in the backward pass.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tercet.types import runs_on_cpu

CPU_TILE, GPU_TILE = 1 << 20, 1 << 26  # scores at once: few enough for the cache of a CPU, enough to fill a GPU


class Masks(NamedTuple):
    """What R anchors have among M keys, of which the first N may be positives."""

    positive: Tensor  # (R, N): the target is the mean of their log probabilities
    left_out: Tensor  # (R, M): no keys of the anchor; no positive is among them
    constant: Tensor | None = None  # (R, M): logits that are numbers without gradient
    wanted: tuple[Tensor, ...] = ()  # (R, N) each: it is counted how often the best key is among them


MaskFunction = Callable[[slice, Tensor], Masks]  # of a slice of anchors and their logits (R, M), which it may edit in place


def cross_entropy(x: Tensor, y: Tensor, masks: MaskFunction, smoothing: float = 0.0, wanted: int = 0) -> tuple[Tensor, Tensor]:
    """The sum over the anchors ``x (n, D)`` that have a positive among the keys ``y (M, D)``; logits are dot products.

    The second result ``(1 + wanted, 2)`` counts the anchors whose best key is a positive, and those that have one; then the
    same of each of ``Masks.wanted``. ``smoothing`` is that of ``torch.nn.CrossEntropyLoss``.
    """
    graded = torch.is_grad_enabled()
    loss_sum, counts = _CrossEntropy.apply(x, y, masks, smoothing, wanted, graded)  # type: ignore[no-untyped-call]
    return loss_sum, counts


def block_statistics(x: Tensor, y: Tensor, masks: MaskFunction, smoothing: float = 0.0) -> Tensor:
    """``(n, 7)`` of each anchor over these keys, from which the loss over several blocks of keys is computed.

    The log of the sum of exp of all logits; the sum and the number of the positives' logits; the sum (only under
    ``smoothing``) and the number of all logits that are not left out; the largest logit, and 1 where it is a positive's.
    """
    return cast(Tensor, _BlockStatistics.apply(x, y, masks, smoothing))  # type: ignore[no-untyped-call]


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, masks: MaskFunction, smoothing: float, wanted: int, graded: bool
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        grad_x, grad_y, sums = torch.empty_like(x), torch.zeros_like(y), x.new_zeros(3 + 2 * wanted)
        for rows in _tiles(x, y):
            mask, logits, best, at = _scores(x[rows], y, masks, rows)
            count = _count(mask.positive, x.dtype)
            has_positive = count.clamp(max=1)  # 1 in all rows, unless there is one view
            share, even = count.clamp_(min=1).reciprocal_(), None
            target = _sum_where(mask.positive, logits).mul_(share)
            if smoothing:
                even = smoothing / _count(~mask.left_out, x.dtype).clamp_(min=1)
                share *= 1 - smoothing
                target = (1 - smoothing) * target + even * _sum_where(~mask.left_out, logits)
            p = logits.softmax(1)
            loss = (best - p.gather(1, at).log_() - target).mul_(has_positive)
            hits = (_is_among(at, which, len(y)) for which in (mask.positive, *mask.wanted))
            possible = (has_positive, *(which.any(1, keepdim=True) for which in mask.wanted))
            sums += torch.cat([loss, *hits, *possible], 1).sum(0)
            if graded:
                slope = _slope(p, mask, share, even)
                grad_y.addmm_(slope.T, x[rows] * has_positive)
                torch.mm(slope, y, out=grad_x[rows]).mul_(has_positive)
        ctx.save_for_backward(grad_x, grad_y)
        counts = sums[1:].view(2, -1).T
        ctx.mark_non_differentiable(counts)
        return sums[0], counts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_y = ctx.saved_tensors
        return grad * grad_x, grad * grad_y, None, None, None, None


class _BlockStatistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, masks: MaskFunction, smoothing: float) -> Tensor:
        ctx.masks, ctx.smoothing = masks, smoothing
        ctx.save_for_backward(x, y)
        statistics = x.new_zeros(len(x), 7)
        statistics[:, 0] = statistics[:, 5] = torch.finfo(x.dtype).min  # what a block without keys has
        for rows in _tiles(x, y):
            mask, logits, best, at = _scores(x[rows], y, masks, rows)
            allowed = ~mask.left_out
            total = _sum_where(allowed, logits) if smoothing else torch.zeros_like(best)
            positives = (_sum_where(mask.positive, logits), _count(mask.positive, x.dtype))
            hit = _is_among(at, mask.positive, len(y))
            columns = (logits.logsumexp(1, keepdim=True), *positives, total, _count(allowed, x.dtype), best, hit)
            statistics[rows] = torch.cat(columns, 1)
        return statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y = ctx.saved_tensors
        grad_x, grad_y = torch.zeros_like(x), torch.zeros_like(y)
        with torch.autocast(x.device.type, enabled=False):
            for rows in _tiles(x, y):
                mask, logits, _, _ = _scores(x[rows], y, ctx.masks, rows)
                log_denominator, positive_sum, _, logit_sum = grad[rows, :4].split(1, 1)
                p = logits.softmax(1).mul_(log_denominator)
                slope = _slope(p, mask, -positive_sum, -logit_sum if ctx.smoothing else None)
                grad_y.addmm_(slope.T, x[rows])
                grad_x[rows] = slope @ y
        return grad_x, grad_y, None, None


def _tiles(x: Tensor, y: Tensor) -> Iterator[slice]:
    step = max(1, (CPU_TILE if runs_on_cpu(x.device) else GPU_TILE) // max(1, len(y)))
    return (slice(start, start + step) for start in range(0, len(x) if len(y) else 0, step))


def _scores(x: Tensor, y: Tensor, masks: MaskFunction, rows: slice) -> tuple[Masks, Tensor, Tensor, Tensor]:
    """The masks of a tile, its logits ``(R, M)``, the best of each row and its place ``(R, 1)``."""
    logits = x @ y.T
    mask = masks(rows, logits)
    logits.masked_fill_(mask.left_out, torch.finfo(x.dtype).min)  # -inf would be NaN in a row of nothing else
    return mask, logits, *logits.max(1, keepdim=True)


def _slope(p: Tensor, mask: Masks, share: Tensor, even: Tensor | None) -> Tensor:
    """In place of ``p``: p - share · positive - even · allowed, the derivative by the logits ``(R, M)``."""
    if even is not None:
        p.addcmul_(~mask.left_out, even, value=-1)
    p[:, : mask.positive.shape[1]].addcmul_(mask.positive, share, value=-1)
    return p if mask.constant is None else p.masked_fill_(mask.constant, 0)


def _sum_where(mask: Tensor, logits: Tensor) -> Tensor:
    return torch.where(mask, logits[:, : mask.shape[1]], 0.0).sum(1, keepdim=True)


def _count(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return mask.sum(1, keepdim=True, dtype=dtype)


def _is_among(at: Tensor, mask: Tensor, num_keys: int) -> Tensor:
    """Whether the key at the place ``at (R, 1)`` of ``num_keys`` is in the mask of the first N keys."""
    if mask.shape[1] == num_keys:
        return mask.gather(1, at)
    return mask.gather(1, at.clamp(max=mask.shape[1] - 1)) & (at < mask.shape[1])
