"""Triplets: a positive nearer than negatives, by a margin."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tercet.errors import InputError
from tercet.losses.triplet_mining import MININGS, ONE_NEGATIVE, MinedTile, Tile, mine_tile
from tercet.types import Embeddings, LossOutput

FORMS = ("hinge", "softplus")
DIVISORS = ("active", "pairs")
# Distances of a tile: few enough for the cache of each CPU thread, enough for all cores of a GPU.
CPU_THREAD, GPU = 1 << 18, 1 << 22


class TripletLoss(nn.Module):
    """FaceNet's loss (Schroff et al. 2015, arXiv:1503.03832, eq. 3), a sum over mined triplets (a, p, n).

        [ ||a - p||^2 - ||a - n||^2 + margin ]_+        on the unit sphere; ``margin`` is on squared distance

    Every pair (a, p) of the batch counts. The positives of a row share its label, or are the other view of the same
    example; its negatives are all others, but never its own content. Views from the third on are negatives for everyone,
    their own example included. A row without a positive is nobody's anchor and everybody's negative; a pair without a
    negative has no loss.

    ``mining`` says which negatives a pair (a, p) gets, of equally near ones any:

    - ``semihard``: the closest with d_an > d_ap (eq. 4); with ``fallback`` the farthest where there is none (TensorFlow
      Addons' ``triplet_semihard_loss`` and sentence-transformers' ``BatchSemiHardTripletLoss``);
    - ``all_semihard``: all with d_ap < d_an < d_ap + margin (pytorch-metric-learning's "semihard");
    - ``hard``: all with d_an <= d_ap (its "hard");
    - ``all``: all (its "all"; batch-all, Hermans et al. 2017, arXiv:1703.07737, eq. 6);
    - ``batch_hard``: the nearest, with the farthest positive alone (their eq. 5);
    - ``easy_positive``: as ``semihard``, with the nearest positive alone (Xuan et al. 2020, arXiv:1904.04370).

    ``form`` ``softplus`` replaces [x]_+ by log(1 + exp(x)); with margin 0 that is the soft margin of Hermans et al. Where
    a pair gets many negatives it costs O(N^2 K) time, K rows of a label; the hinge costs O(N^2 log N).

    ``divide_by`` ``active``: the mean over triplets with a loss (Hermans' batch-all, pytorch-metric-learning's default);
    ``pairs``: over mined pairs (a, p), with a loss or not (TensorFlow Addons, sentence-transformers). Either counts
    over all processes. The libraries compute the same where their distance is squared too, as tests/loss shows; in a
    batch without negatives TensorFlow Addons and sentence-transformers pull positives together, and this does not.

    Value and gradient come from one pass over tiles of ``tile`` anchor rows (null: by itself): O(tile · N) memory beside
    the embeddings, whatever the number of triplets. The gradient is exact; it cannot be differentiated again. An
    embedding that is not finite makes the loss NaN. Half precision is scored in float32.
    """

    def __init__(self, margin: float, mining: str, fallback: bool, form: str, divide_by: str, tile: int | None) -> None:
        super().__init__()
        for name, value, choices in (
            ("mining", mining, MININGS),
            ("form", form, FORMS),
            ("divide_by", divide_by, DIVISORS),
        ):
            if value not in choices:
                raise InputError(f"loss.{name}={value}: choose one of {', '.join(choices)}.")
        if not 0 <= margin <= 4:
            raise InputError(f"loss.margin={margin}: on squared distances, which are 0 to 4; 0.2 in the paper.")
        beyond = mining in ("semihard", "easy_positive") and form == "hinge" and not fallback
        if margin == 0 and (beyond or mining == "all_semihard"):  # all their negatives are far enough
            raise InputError(f"loss.margin={margin} leaves loss.mining={mining} nothing to learn from. Use 0.2, the paper's.")
        if fallback and mining not in ("semihard", "easy_positive"):
            raise InputError(f"loss.fallback=true is for loss.mining=semihard and easy_positive, not for {mining}.")
        if tile is not None and tile < 1:
            raise InputError(f"loss.tile={tile}: a number of anchor rows above 0, or null.")
        self.margin = margin
        self.mining = mining
        self.fallback = fallback
        self.form = form
        self.divide_by = divide_by
        self.tile = tile

    @property
    def collapsed_loss(self) -> float:
        """The loss of a triplet whose embeddings are equal: where a collapsed encoder stays."""
        return self.margin if self.form == "hinge" else float(F.softplus(torch.tensor(self.margin)))

    def forward(self, anchors: Embeddings, keys: Embeddings) -> LossOutput:
        """``z (V, N, D)``. ``count`` is the number of active triplets or of mined pairs, as ``divide_by`` says."""
        with torch.autocast(anchors.z.device.type, enabled=False):  # half precision is half the distance of near ones
            x, y = _flat(anchors, min(2, len(anchors.z))), _flat(keys, len(keys.z))
            out: tuple[Tensor, ...] = _Sum.apply(x.z, y.z, x, y, self)  # type: ignore[no-untyped-call]
        total, active, mined, pairs, triplets, near, far, others = out
        count = active if self.divide_by == "active" else mined
        one = self.mining in ONE_NEGATIVE
        stats = {
            "active": torch.stack([active, mined if one else triplets]),
            "positive_distance": torch.stack([near, pairs]),
            "negative_distance": torch.stack([far, others]),
        }
        return LossOutput(total, count, stats)


@dataclass(frozen=True)
class _Rows:
    """Embeddings ``(n, D)`` on the unit sphere; rows of equal ``group`` are no negatives, ``view`` tells twins apart."""

    z: Tensor
    example_id: Tensor
    view: Tensor
    group: Tensor
    content: Tensor

    def at(self, which: Tensor | slice) -> "_Rows":
        return _Rows(self.z[which], self.example_id[which], self.view[which], self.group[which], self.content[which])


def _flat(e: Embeddings, views: int) -> _Rows:
    z = e.z[:views].flatten(0, 1)
    z = F.normalize(z.float() if z.dtype in (torch.float16, torch.bfloat16) else z, dim=-1, eps=1e-6)
    own = torch.where(e.label >= 0, e.label, -2 - e.example_id)  # without a label, the views of an example are a group
    group = torch.cat([own if v < 2 else torch.full_like(own, -1) for v in range(views)])
    view = torch.arange(views, device=z.device).repeat_interleave(len(e))
    return _Rows(z, e.example_id.repeat(views), view, group, e.content_hash[:views].flatten())


class _Sum(torch.autograd.Function):
    """The loss over all anchors and its gradient, tile by tile: only the gradient of the embeddings is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, anchors: _Rows, keys: _Rows, loss: TripletLoss) -> tuple[Tensor, ...]:
        keys = keys.at(order := keys.group.argsort(stable=True))  # a label's keys lie side by side
        anchors = _Rows(x.detach(), anchors.example_id, anchors.view, anchors.group, anchors.content)
        plan = _Plan.of(anchors, keys)
        grad_x, grad_y = torch.zeros_like(x), torch.zeros_like(y)
        sums = torch.zeros(8, dtype=torch.float64, device=x.device)
        sums[0] = 0 * (x.sum() + y.sum())  # a search passes over NaN: say so
        most = CPU_THREAD * torch.get_num_threads() if x.device.type == "cpu" else GPU
        size = loss.tile or max(1, most // max(1, len(y)))
        for start in range(0, len(x) if len(y) else 0, size):
            rows = slice(start, start + size)
            tile = plan.tile(rows)
            mined = mine_tile(tile, loss.mining, loss.fallback, loss.margin, loss.form == "softplus")
            sums += _sums(tile, mined)
            grad_x[rows] = -2 * (mined.weight @ keys.z)  # the distance is 2 - 2 x·y
            grad_y.addmm_(mined.weight.T, anchors.z[rows], alpha=-2)
        ctx.save_for_backward(grad_x, torch.empty_like(grad_y).index_copy_(0, order, grad_y))
        total, *others = sums.unbind()
        ctx.mark_non_differentiable(*others)
        return total.to(x.dtype), *others

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *others: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_y = ctx.saved_tensors
        return grad * grad_x, grad * grad_y, None, None, None


def _sums(tile: Tile, mined: MinedTile) -> Tensor:
    """Total, active triplets, mined pairs; all pairs and triplets; distances of positives; of negatives, their number."""
    near, far = (d.nan_to_num(posinf=0.0).sum().double() for d in (tile.positive, tile.negative))
    pairs = tile.positive.isfinite().sum(1, keepdim=True)
    triplets = (pairs * tile.negatives).sum()
    counts = (mined.num_active, mined.num_pairs, pairs.sum(), triplets, near, far, tile.negatives.sum())
    return torch.stack([mined.loss_sum, *(count.double() for count in counts)])


@dataclass(frozen=True)
class _Plan:
    """Where each anchor's label lies among the keys, ``[start, end)``, and the length K of the longest such run."""

    anchors: _Rows
    keys: _Rows
    start: Tensor
    end: Tensor
    longest: int

    @staticmethod
    def of(anchors: _Rows, keys: _Rows) -> "_Plan":
        start = torch.searchsorted(keys.group, anchors.group)
        end = torch.searchsorted(keys.group, anchors.group, right=True)
        longest = max(1, int((end - start).max())) if len(start) else 1
        return _Plan(anchors, keys, start, end, longest)

    def tile(self, which: slice) -> Tile:
        anchors, keys, start, end = self.anchors.at(which), self.keys, self.start[which, None], self.end[which, None]
        distance = torch.mm(anchors.z, keys.z.T).mul_(-2).add_(2).clamp_(min=0)
        place = start + torch.arange(self.longest, device=start.device)
        key = place % len(keys.z)  # a row's keys are distinct; those beyond its label are left as they are
        own = distance.gather(1, key)
        same_row = (keys.example_id[key] == anchors.example_id[:, None]) & (keys.view[key] == anchors.view[:, None])
        positive, order = own.masked_fill((place >= end) | same_row, torch.inf).sort(1)
        # A hard negative of one's own example is a negative, another copy of the example is not.
        distance.scatter_(1, key, own.masked_fill(place < end, torch.inf))
        distance.masked_fill_(anchors.content[:, None] == keys.content, torch.inf)
        negative, negative_key = _sort(distance)
        negatives = torch.searchsorted(negative, torch.full_like(negative[:, :1], torch.inf))
        return Tile(positive, key.gather(1, order), negative, negative_key, negatives)


def _sort(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of numbers from 0 up, ascending, and where each was."""
    if x.dtype != torch.float32 or x.device.type != "cpu":
        return torch.sort(x, dim=1)
    # Positive floats sort like their bits; value and place in one integer sort several times as fast on a CPU.
    packed = torch.empty(x.shape, dtype=torch.long)
    place, value = packed.view(torch.int32).view(*x.shape, 2).unbind(2)  # the low half, the high half
    place.copy_(torch.arange(x.shape[1]))
    value.copy_(x.view(torch.int32))
    parts = packed.tensor_split(torch.get_num_threads())
    with ThreadPoolExecutor(len(parts)) as pool:  # numpy sorts without the interpreter's lock
        list(pool.map(lambda part: part.numpy().sort(axis=1), parts))
    return value.contiguous().view(torch.float32), place.long()
