"""The triplet loss: a positive nearer than the negatives, by a margin."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tercet.errors import check_choice, require
from tercet.losses import base
from tercet.losses.info_nce import prepare_for_similarity
from tercet.losses.triplet_mining import MININGS, ONE_NEGATIVE, Tile, expand_triplets, mine_tile
from tercet.types import Embeddings, LossOutput, runs_on_cpu

# Distances of a tile: few enough for the cache of each CPU thread, enough for all cores of a GPU.
CPU_THREAD_TILE, GPU_TILE = 1 << 18, 1 << 22
# Up to so many distances (of softplus windows: triplets) all keys may be positives on a GPU; beyond, the largest number of
# positives is read from it, for which the host waits.
UNREAD = 1 << 27
STATISTICS = ("active", "positive_distance", "negative_distance")


class TripletLoss(nn.Module):
    """FaceNet's loss (Schroff et al. 2015, arXiv:1503.03832, eq. 3), a sum over mined triplets (a, p, n).

        [ ||a - p||^2 - ||a - n||^2 + margin ]_+        on the unit sphere; ``margin`` is on squared distance

    The positives of a row share its label, or are the other view of the same example; its negatives are all others, but
    never rows of its own content, nor the views of an example that shares its first or its second view with the row's (of
    several answers to one question none is a negative). Views from the third on are negatives for all rows, including
    their own example.

    ``mining`` is which negatives each pair (a, p) of the batch gets; of equally near ones any:

    - ``semihard``: the closest with d_an > d_ap (eq. 4); with ``fallback`` the farthest where there is none;
    - ``all_semihard``: all with d_ap < d_an < d_ap + margin (pytorch-metric-learning's "semihard");
    - ``hard``: all with d_an <= d_ap (its "hard");
    - ``all``: all (its "all"; batch-all, Hermans et al. 2017, arXiv:1703.07737, eq. 6);
    - ``batch_hard``: the nearest, with the farthest positive alone (their eq. 5);
    - ``easy_positive``: as ``semihard``, with the nearest positive alone (Xuan et al. 2020, arXiv:1904.04370).

    ``form`` "softplus" is log(1 + exp(x)) in place of [x]_+, with margin 0 the soft margin of Hermans et al. Where a pair
    gets many negatives it costs O(N^2 K) time, K rows of a label; the "hinge" costs O(N^2 log N). ``divide_by`` "active"
    is the mean over triplets with a loss (pytorch-metric-learning's default), "pairs" over mined pairs (a, p), with a
    loss or not (TensorFlow Addons and sentence-transformers, with ``fallback``); "sum" divides by nothing, as eq. 3.

    ``tile`` anchor rows (None chooses) are scored at a time, in O(tile · N) memory. The gradient is exact; it cannot be
    differentiated again. An embedding that is not finite makes the loss NaN. Half precision is scored in float32.

    >>> z = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.6, -0.8]])
    >>> loss = TripletLoss(margin=0.5, mining="semihard")
    >>> round(float(loss(z, labels=[0, 0, 1])), 4)  # one active triplet, rows (0, 1, 2): 0.4 - 0.8 + 0.5
    0.1
    """

    positives: ClassVar[frozenset[str]] = frozenset({"example", "label"})
    needs_hard_negatives: ClassVar[bool] = False

    def __init__(
        self, margin: float = 0.2, mining: str = "semihard", fallback: bool = False, form: str = "hinge",
        divide_by: str = "active", tile: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        check_choice("mining", mining, MININGS)
        check_choice("form", form, ("hinge", "softplus"))
        check_choice("divide_by", divide_by, ("active", "pairs", "sum"))
        require(0 <= margin <= 4, f"`margin`={margin}: a number from 0 to 4, on squared distances; 0.2 in the paper.")
        one = mining in ("semihard", "easy_positive")
        useless = margin == 0 and (mining == "all_semihard" or (one and form == "hinge" and not fallback))
        require(not useless, f"`margin`={margin} leaves `mining`={mining} nothing to learn from. Use 0.2, the paper's.")
        require(one or not fallback, f"`fallback`=true is for `mining`=semihard and easy_positive, not for {mining}.")
        require(tile is None or tile >= 1, f"`tile`={tile}: a number of anchor rows above 0, or null.")
        self.margin, self.mining, self.fallback = margin, mining, fallback
        self.form, self.divide_by, self.tile = form, divide_by, tile
        # The loss of three equal embeddings, at which a collapsed encoder stays; a sum depends on their number as well.
        collapsed = margin if form == "hinge" else float(F.softplus(torch.tensor(float(margin))))
        self.collapsed_loss = None if divide_by == "sum" else collapsed

    def forward(
        self, z: Embeddings | Tensor, labels: Embeddings | base.Integers | None = None, *,
        ids: base.Integers | None = None, content: base.Integers | None = None,
    ) -> LossOutput | Tensor:  # fmt: skip
        """The mean over all processes, of tensors; the sum over anchors, of anchor and key ``Embeddings (V, n, D)``.

        ``z (N, D)`` or, with V views of each example, ``(V, N, D)``; ``labels (N,)``, below 0 for none. ``ids (N,)`` are equal
        for rows of one example, ``content (N,)`` or ``(V, N)`` for equal items, which are no negatives of each other; left
        out, all are distinct. The normalizer of a sum is the number of active triplets or of mined pairs, 0 for "sum".
        """
        if not isinstance(z, Embeddings) or not isinstance(labels, Embeddings):
            return base.mean_loss(self, _labeled_embeddings(z, labels, ids, content))
        with torch.autocast(z.z.device.type, enabled=False):  # half precision halves the distance of near rows
            x = _flatten_views(z, min(2, len(z.z)))
            y = x if labels is z and len(z.z) <= 2 else _flatten_views(labels, len(labels.z))
            loss_sum, sums = _TripletSum.apply(x.z, y.z, x, y, self)  # type: ignore[no-untyped-call]
        mined, stats = sums[1], sums[2:].view(3, 2)
        count = {"active": stats[0, 0], "pairs": mined, "sum": torch.zeros_like(mined)}[self.divide_by]
        return LossOutput(loss_sum, count, dict(zip(STATISTICS, stats, strict=True)))


def mine(
    z: Tensor, labels: base.Integers | None = None, mining: str = "semihard", margin: float = 0.2, *,
    fallback: bool = False, form: str = "hinge", tile: int | None = None,
    ids: base.Integers | None = None, content: base.Integers | None = None,
) -> Iterator[Tensor]:  # fmt: skip
    """The triplets that ``TripletLoss`` counts as active, generated lazily as int64 tensors (anchor, positive, negative).

    Each is ``(3, t)``: indices of rows of ``z (N, D)``, or of ``z.flatten(0, 1)`` where z is ``(V, N, D)``; of this process's
    rows alone. The parameters are those of ``TripletLoss`` and of its call.

    >>> z = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.8, 0.2], [0.7, 0.3]]), dim=1)
    >>> anchor, positive, negative = torch.cat(list(mine(z, labels=[0, 0, 1, 1])), dim=1)
    >>> anchor.tolist(), positive.tolist(), negative.tolist()
    ([0, 1, 2, 3], [1, 0, 3, 2], [2, 2, 0, 1])
    """
    loss = TripletLoss(margin, mining, fallback, form, "active", tile)
    embeddings = _labeled_embeddings(z, labels, ids, content)
    return _triplets(replace(embeddings, z=embeddings.z.detach()), loss)


def _triplets(embeddings: Embeddings, loss: TripletLoss) -> Iterator[Tensor]:
    anchors, keys = _flatten_views(embeddings, min(2, len(embeddings.z))), _flatten_views(embeddings, len(embeddings.z))
    order = keys.group.argsort(stable=True)
    yield order.new_zeros(3, 0)
    for rows, tile in _tiles(anchors, keys.at(order), loss):
        for row, positive, negative in expand_triplets(tile, loss.mining, loss.fallback, loss.margin, loss.form == "softplus"):
            yield torch.stack([row + rows.start, order[positive], order[negative]])


def _labeled_embeddings(z: object, labels: Any, ids: base.Integers | None, content: base.Integers | None) -> Embeddings:
    x = base.check_embeddings("z", z, views=True)
    has_positives = labels is not None or x.dim() == 3
    require(has_positives, "`labels`: integers (N,) are needed where `z` is (N, D): rows of one label are positives.")
    return base.make_embeddings(x if x.dim() == 3 else x[None], ids, content, labels)


@dataclass(frozen=True)
class _FlatRows:
    """The rows of all views, ``z (n, D)`` on the unit sphere; rows of equal ``group`` are no negatives of each other."""

    z: Tensor
    example_id: Tensor
    view: Tensor  # tells the views of an example apart
    group: Tensor
    content: Tensor
    example: Tensor  # (n, 2), the content of the first two views of the example; (n, 1) where there is one view

    def at(self, which: Tensor | slice) -> "_FlatRows":
        return _FlatRows(**{name: x[which] for name, x in vars(self).items()})


def _flatten_views(e: Embeddings, views: int) -> _FlatRows:
    z = prepare_for_similarity(e.z[:views].flatten(0, 1), "cosine")
    own = base.positive_group(e)
    group = torch.cat([own if v < 2 else torch.full_like(own, -1) for v in range(views)])
    view = torch.arange(views, device=z.device).repeat_interleave(len(e))
    example = e.content_hash[:2].T.repeat(views, 1)
    return _FlatRows(z, e.example_id.repeat(views), view, group, e.content_hash[:views].flatten(), example)


class _TripletSum(torch.autograd.Function):
    """The loss over all anchors and its gradient, tile by tile; only the gradient of the embeddings is kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, anchors: _FlatRows, keys: _FlatRows, loss: TripletLoss
    ) -> tuple[Tensor, Tensor]:
        keys = keys.at(order := keys.group.argsort(stable=True))  # a label's keys become adjacent
        grad_x, grad_y = torch.zeros_like(x), torch.zeros_like(y)
        sums = torch.zeros(8, dtype=torch.float64, device=x.device)
        sums[0] = 0 * (x.sum() + y.sum())  # sorting and searching would hide NaN
        for rows, tile in _tiles(anchors, keys, loss):
            counts, weight = mine_tile(tile, loss.mining, loss.fallback, loss.margin, loss.form == "softplus")
            loss_sum, active, mined = counts
            positives = (tile.positive < torch.inf).sum(1, keepdim=True)
            near, far = (d.nan_to_num(posinf=0.0).sum(dtype=sums.dtype) for d in (tile.positive, tile.negative))
            possible = mined if loss.mining in ONE_NEGATIVE else (positives * tile.num_negatives).sum(dtype=sums.dtype)
            pairs, negatives = positives.sum(dtype=sums.dtype), tile.num_negatives.sum(dtype=sums.dtype)
            sums += torch.stack([loss_sum, mined, active, possible, near, pairs, far, negatives])
            grad_x[rows] = -2 * (weight @ keys.z)  # the distance is 2 - 2 x·y
            grad_y.addmm_(weight.T, anchors.z[rows], alpha=-2)
        ctx.save_for_backward(grad_x, torch.empty_like(grad_y).index_copy_(0, order, grad_y))
        ctx.mark_non_differentiable(sums)
        return sums[0].to(x.dtype, copy=True), sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_y = ctx.saved_tensors
        return grad * grad_x, grad * grad_y, None, None, None


def _tiles(anchors: _FlatRows, keys: _FlatRows, loss: TripletLoss) -> Iterator[tuple[slice, Tile]]:
    """Which anchor rows, and their tile. ``keys`` are sorted by group: those of an anchor's group are ``[start, end)``."""
    if not len(anchors.z) or not len(keys.z):
        return
    start, end = (torch.searchsorted(keys.group, anchors.group, right=right)[:, None] for right in (False, True))
    on_cpu, num_keys = runs_on_cpu(start.device), len(keys.z)
    windows = loss.form == "softplus" and loss.mining not in ONE_NEGATIVE
    costs = len(start) * num_keys * (num_keys if windows else 1)
    # K: how many positives a row has at most, as far as that is known without waiting for the device.
    longest = max(1, int((end - start).max())) if on_cpu or costs > UNREAD else num_keys
    most = CPU_THREAD_TILE * torch.get_num_threads() if on_cpu else GPU_TILE
    size = loss.tile or max(1, most // num_keys)
    for first in range(0, len(anchors.z), size):
        rows = slice(first, first + size)
        yield rows, _make_tile(anchors.at(rows), keys, start[rows], end[rows], longest)


def _make_tile(anchors: _FlatRows, keys: _FlatRows, start: Tensor, end: Tensor, longest: int) -> Tile:
    distance = torch.mm(anchors.z, keys.z.T).mul_(-2).add_(2).clamp_(min=0)
    place = start + torch.arange(longest, device=start.device)
    key = place % len(keys.z)  # distinct keys in each row; those beyond the span are masked below
    own = distance.gather(1, key)
    same_row = (keys.example_id[key] == anchors.example_id[:, None]) & (keys.view[key] == anchors.view[:, None])
    positive = own.masked_fill((place >= end) | same_row, torch.inf)
    # A hard negative of the anchor's own example is a negative, another copy of the example is not.
    distance.scatter_(1, key, own.masked_fill(place < end, torch.inf))
    distance.masked_fill_(anchors.content[:, None] == keys.content, torch.inf)
    if keys.example.shape[1] > 1:
        for mine, theirs in zip(anchors.example.T, keys.example.T, strict=True):
            distance.masked_fill_((mine[:, None] == theirs) & (keys.view < 2), torch.inf)
    negative, negative_key = _sort(distance)
    num_negatives = torch.searchsorted(negative, torch.full_like(negative[:, :1], torch.inf))
    return Tile(positive, key, negative, negative_key, num_negatives)


def _sort(x: Tensor) -> tuple[Tensor, Tensor]:
    """Sort each row of non-negative numbers; returns values and indices."""
    if x.dtype != torch.float32 or not runs_on_cpu(x.device):
        return torch.sort(x, dim=1)
    # Positive floats sort like their bits; value and index in one integer sort several times as fast on a CPU.
    packed = torch.empty(x.shape, dtype=torch.long)
    index, value = packed.view(torch.int32).view(*x.shape, 2).unbind(2)  # the low half, the high half
    index.copy_(torch.arange(x.shape[1]))
    value.copy_(x.view(torch.int32))
    parts = packed.tensor_split(torch.get_num_threads())
    with ThreadPoolExecutor(len(parts)) as pool:  # numpy sorts without the interpreter's lock
        list(pool.map(lambda part: part.numpy().sort(axis=1), parts))
    return value.contiguous().view(torch.float32), index.long()
