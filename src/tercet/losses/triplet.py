"""The triplet loss: a positive nearer than the negatives, by a margin."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tercet.errors import InputError, check_choice
from tercet.losses import base
from tercet.losses.triplet_mining import MININGS, ONE_NEGATIVE, MinedTile, Tile, expand_triplets, mine_tile
from tercet.types import Embeddings, LossOutput

FORMS = ("hinge", "softplus")
DIVISORS = ("active", "pairs")
# Distances of a tile: few enough for the cache of each CPU thread, enough for all cores of a GPU.
CPU_THREAD_TILE, GPU_TILE = 1 << 18, 1 << 22


class TripletLoss(nn.Module):
    """FaceNet's loss (Schroff et al. 2015, arXiv:1503.03832, eq. 3), a sum over mined triplets (a, p, n).

        [ ||a - p||^2 - ||a - n||^2 + margin ]_+        on the unit sphere; ``margin`` is on squared distance

    Every pair (a, p) of the batch counts. The positives of a row share its label, or are the other view of the same
    example; its negatives are all others, but never rows of its own content. Views from the third on are negatives for
    all rows, including their own example. A row without a positive is used only as a negative; a pair without a negative
    has no loss.

    ``mining`` is which negatives a pair (a, p) gets; of equally near ones any:

    - ``semihard``: the closest with d_an > d_ap (eq. 4); with ``fallback`` the farthest where there is none (TensorFlow
      Addons' ``triplet_semihard_loss`` and sentence-transformers' ``BatchSemiHardTripletLoss``);
    - ``all_semihard``: all with d_ap < d_an < d_ap + margin (pytorch-metric-learning's "semihard");
    - ``hard``: all with d_an <= d_ap (its "hard");
    - ``all``: all (its "all"; batch-all, Hermans et al. 2017, arXiv:1703.07737, eq. 6);
    - ``batch_hard``: the nearest, with the farthest positive alone (their eq. 5);
    - ``easy_positive``: as ``semihard``, with the nearest positive alone (Xuan et al. 2020, arXiv:1904.04370).

    ``form`` "softplus" replaces [x]_+ by log(1 + exp(x)); with margin 0 that is the soft margin of Hermans et al. Where
    a pair gets many negatives it costs O(N^2 K) time, K rows of a label; the "hinge" costs O(N^2 log N).

    ``divide_by`` "active": the mean over triplets with a loss (Hermans' batch-all, pytorch-metric-learning's default);
    "pairs": over mined pairs (a, p), with a loss or not (TensorFlow Addons, sentence-transformers). Either counts over
    all processes. The libraries compute the same where their distance is squared too, as tests/losses shows; in a batch
    without negatives TensorFlow Addons and sentence-transformers pull positives together, and this does not.

    Value and gradient come from one pass over tiles of ``tile`` anchor rows (None chooses): O(tile · N) memory beside the
    embeddings, whatever the number of triplets. The gradient is exact; it cannot be differentiated again. An embedding
    that is not finite makes the loss NaN. Half precision is scored in float32.

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
        check_choice("form", form, FORMS)
        check_choice("divide_by", divide_by, DIVISORS)
        if not 0 <= margin <= 4:
            raise InputError(f"`margin`={margin}: a number from 0 to 4, on squared distances; 0.2 in the paper.")
        beyond = mining in ("semihard", "easy_positive") and form == "hinge" and not fallback
        if margin == 0 and (beyond or mining == "all_semihard"):  # all their negatives are far enough
            raise InputError(f"`margin`={margin} leaves `mining`={mining} nothing to learn from. Use 0.2, the paper's.")
        if fallback and mining not in ("semihard", "easy_positive"):
            raise InputError(f"`fallback`=true is for `mining`=semihard and easy_positive, not for {mining}.")
        if tile is not None and tile < 1:
            raise InputError(f"`tile`={tile}: a number of anchor rows above 0, or null.")
        self.margin = margin
        self.mining = mining
        self.fallback = fallback
        self.form = form
        self.divide_by = divide_by
        self.tile = tile

    @property
    def collapsed_loss(self) -> float:
        """The loss of a triplet whose three embeddings are equal: the value at which a collapsed encoder stays."""
        return self.margin if self.form == "hinge" else float(F.softplus(torch.tensor(self.margin)))

    def forward(
        self, z: Embeddings | Tensor, labels: Embeddings | base.Integers | None = None, *,
        ids: base.Integers | None = None, content: base.Integers | None = None,
    ) -> LossOutput | Tensor:  # fmt: skip
        """The mean over all processes, of tensors; the sum over anchors, of anchor and key ``Embeddings``.

        ``z (N, D)`` or, with V views of each example, ``(V, N, D)``; ``labels (N,)``, below 0 for none. ``ids (N,)`` are equal
        for rows of one example, ``content (N,)`` or ``(V, N)`` for equal items, which are no negatives of each other; left
        out, all are distinct.

        Of ``Embeddings (V, n, D)`` and ``(V, N, D)`` the normalizer is the number of active triplets or of mined pairs.
        """
        if isinstance(z, Embeddings) and isinstance(labels, Embeddings):
            return self._sum(z, labels)
        return base.mean_loss(self, _labeled_embeddings(z, labels, ids, content))

    def _sum(self, anchors: Embeddings, keys: Embeddings) -> LossOutput:
        with torch.autocast(anchors.z.device.type, enabled=False):  # half precision halves the distance of near rows
            x, y = _flatten_views(anchors, min(2, len(anchors.z))), _flatten_views(keys, len(keys.z))
            out: tuple[Tensor, ...] = _TripletSum.apply(x.z, y.z, x, y, self)  # type: ignore[no-untyped-call]
        loss_sum, active, mined, pairs, triplets, near, far, negatives = out
        count = active if self.divide_by == "active" else mined
        one = self.mining in ONE_NEGATIVE
        stats = {
            "active": torch.stack([active, mined if one else triplets]),
            "positive_distance": torch.stack([near, pairs]),
            "negative_distance": torch.stack([far, negatives]),
        }
        return LossOutput(loss_sum, count, stats)

    def tile_rows(self, keys: Tensor) -> int:
        """The number of anchor rows in a tile against ``keys (M, D)``."""
        most = CPU_THREAD_TILE * torch.get_num_threads() if keys.device.type == "cpu" else GPU_TILE
        return self.tile or max(1, most // max(1, len(keys)))


def mine(
    z: Tensor, labels: base.Integers | None = None, mining: str = "semihard", margin: float = 0.2, *,
    fallback: bool = False, form: str = "hinge", tile: int | None = None,
    ids: base.Integers | None = None, content: base.Integers | None = None,
) -> Iterator[Tensor]:  # fmt: skip
    """The triplets that ``TripletLoss`` counts as active, generated lazily as int64 tensors (anchor, positive, negative).

    Each is ``(3, t)``: indices of rows of ``z (N, D)``, or of ``z.flatten(0, 1)`` where z is ``(V, N, D)``. The parameters
    are those of ``TripletLoss`` and of its call. Triplets are those of this process's rows alone. ``torch.cat`` joins them:

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
    spans, size = _LabelSpans.find(anchors, keys.at(order)), loss.tile_rows(keys.z)
    yield order.new_zeros(3, 0)
    for start in range(0, len(anchors.z), size):
        tile = spans.tile(slice(start, start + size))
        for row, positive, negative in expand_triplets(tile, loss.mining, loss.fallback, loss.margin, loss.form == "softplus"):
            yield torch.stack([row + start, order[positive], order[negative]])


def _labeled_embeddings(z: object, labels: object, ids: base.Integers | None, content: base.Integers | None) -> Embeddings:
    x = base.check_embeddings("z", z, views=True)
    if labels is None and x.dim() == 2:
        raise InputError("`labels`: integers (N,) are needed where `z` is (N, D): rows of one label are positives.")
    x = x if x.dim() == 3 else x[None]
    label = None if labels is None else base.check_integers("labels", labels, x, x.shape[1:2])  # type: ignore[arg-type]
    return base.make_embeddings(x, label, None, ids, content)


@dataclass(frozen=True)
class _FlatRows:
    """The rows of all views, ``z (n, D)`` on the unit sphere; rows of equal ``group`` are no negatives of each other.

    ``view`` tells the two views of an example apart.
    """

    z: Tensor
    example_id: Tensor
    view: Tensor
    group: Tensor
    content: Tensor

    def at(self, which: Tensor | slice) -> "_FlatRows":
        return _FlatRows(self.z[which], self.example_id[which], self.view[which], self.group[which], self.content[which])


def _flatten_views(e: Embeddings, views: int) -> _FlatRows:
    z = e.z[:views].flatten(0, 1)
    z = F.normalize(z.float() if z.dtype in (torch.float16, torch.bfloat16) else z, dim=-1, eps=1e-6)
    own = torch.where(e.label >= 0, e.label, -2 - e.example_id)  # without a label, the views of an example are a group
    group = torch.cat([own if v < 2 else torch.full_like(own, -1) for v in range(views)])
    view = torch.arange(views, device=z.device).repeat_interleave(len(e))
    return _FlatRows(z, e.example_id.repeat(views), view, group, e.content_hash[:views].flatten())


class _TripletSum(torch.autograd.Function):
    """The loss over all anchors and its gradient, tile by tile; only the gradient of the embeddings is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, anchors: _FlatRows, keys: _FlatRows, loss: TripletLoss) -> tuple[Tensor, ...]:
        keys = keys.at(order := keys.group.argsort(stable=True))  # a label's keys become adjacent
        anchors = replace(anchors, z=x.detach())
        spans = _LabelSpans.find(anchors, keys)
        grad_x, grad_y = torch.zeros_like(x), torch.zeros_like(y)
        sums = torch.zeros(8, dtype=torch.float64, device=x.device)
        sums[0] = 0 * (x.sum() + y.sum())  # sorting and searching would hide NaN
        size = loss.tile_rows(y)
        for start in range(0, len(x) if len(y) else 0, size):
            rows = slice(start, start + size)
            tile = spans.tile(rows)
            mined = mine_tile(tile, loss.mining, loss.fallback, loss.margin, loss.form == "softplus")
            sums += _tile_sums(tile, mined)
            grad_x[rows] = -2 * (mined.weight @ keys.z)  # the distance is 2 - 2 x·y
            grad_y.addmm_(mined.weight.T, anchors.z[rows], alpha=-2)
        ctx.save_for_backward(grad_x, torch.empty_like(grad_y).index_copy_(0, order, grad_y))
        loss_sum, *others = sums.unbind()
        ctx.mark_non_differentiable(*others)
        return loss_sum.to(x.dtype), *others

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *others: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_y = ctx.saved_tensors
        return grad * grad_x, grad * grad_y, None, None, None


def _tile_sums(tile: Tile, mined: MinedTile) -> Tensor:
    """Loss, active triplets, mined pairs; all pairs, all triplets; distances of positives and of negatives; negatives."""
    near, far = (d.nan_to_num(posinf=0.0).sum().double() for d in (tile.positive, tile.negative))
    pairs = tile.positive.isfinite().sum(1, keepdim=True)
    triplets = (pairs * tile.num_negatives).sum()
    counts = (mined.num_active, mined.num_pairs, pairs.sum(), triplets, near, far, tile.num_negatives.sum())
    return torch.stack([mined.loss_sum, *(count.double() for count in counts)])


@dataclass(frozen=True)
class _LabelSpans:
    """Where the keys of each anchor's group are, ``[start, end)`` of the keys sorted by group, and the longest span, K."""

    anchors: _FlatRows
    keys: _FlatRows
    start: Tensor
    end: Tensor
    longest: int

    @staticmethod
    def find(anchors: _FlatRows, keys: _FlatRows) -> "_LabelSpans":
        start = torch.searchsorted(keys.group, anchors.group)
        end = torch.searchsorted(keys.group, anchors.group, right=True)
        longest = max(1, int((end - start).max())) if len(start) else 1
        return _LabelSpans(anchors, keys, start, end, longest)

    def tile(self, which: slice) -> Tile:
        anchors, keys, start, end = self.anchors.at(which), self.keys, self.start[which, None], self.end[which, None]
        distance = torch.mm(anchors.z, keys.z.T).mul_(-2).add_(2).clamp_(min=0)
        place = start + torch.arange(self.longest, device=start.device)
        key = place % len(keys.z)  # distinct keys in each row; those beyond the span are masked below
        own = distance.gather(1, key)
        same_row = (keys.example_id[key] == anchors.example_id[:, None]) & (keys.view[key] == anchors.view[:, None])
        positive, order = own.masked_fill((place >= end) | same_row, torch.inf).sort(1)
        # A hard negative of the anchor's own example is a negative, another copy of the example is not.
        distance.scatter_(1, key, own.masked_fill(place < end, torch.inf))
        distance.masked_fill_(anchors.content[:, None] == keys.content, torch.inf)
        negative, negative_key = _sort(distance)
        num_negatives = torch.searchsorted(negative, torch.full_like(negative[:, :1], torch.inf))
        return Tile(positive, key.gather(1, order), negative, negative_key, num_negatives)


def _sort(x: Tensor) -> tuple[Tensor, Tensor]:
    """Sort each row of non-negative numbers; returns values and indices."""
    if x.dtype != torch.float32 or x.device.type != "cpu":
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
