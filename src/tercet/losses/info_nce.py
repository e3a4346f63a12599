"""InfoNCE: tell the positive among all keys."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tercet.errors import InputError
from tercet.losses.blockwise import apply_in_slices
from tercet.types import Embeddings, LossOutput

SIMILARITIES = ("cosine", "dot")
DIRECTIONS = ("forward", "both")
KEY_EXCHANGES = ("auto", "gather", "ring")
# Of an anchor and some keys: log of the sum of exp of all scores; sum and number of the positives' scores; sum and number
# of all that are not left out; the best score, and whether a positive has it.
STATISTICS = ("below", "sought", "positives", "even", "allowed", "best", "hit")


class InfoNCE(nn.Module):
    """Cross entropy of the positive among the keys: SimCSE's loss (Gao et al. 2021, arXiv:2104.08821).

    With s the similarity and t the temperature, the sum over anchor rows i of

        -1/|P(i)| · sum over p in P(i) of log( exp(s(i,p)/t) / sum over k of exp(s(i,k)/t) )      (their eq. 1)

    Anchors are view 0; keys are view 1 and, as negatives for everyone, views 2 and on (their eq. 5), whose logit on
    one's own row gets ``hard_negative_weight`` = log alpha added (their eq. 8). P(i) is the row's own key and, where
    there are labels, every key of the same label (SupCon, Khosla et al. 2020, arXiv:2004.11362, eq. 2). A key that is
    no positive but holds the same content as the anchor or its positive is left out.

    ``label_smoothing`` spreads this share of the target evenly over all keys that are not left out, as that of
    ``torch.nn.CrossEntropyLoss`` does.

    ``direction`` ``forward`` scores view 0 against view 1 as in the paper; ``both`` adds the mirror image (without
    hard negatives, which have no anchors of their own) and halves the sum, as CLIP does.

    ``exchange`` says how keys come from other processes: ``gather`` all of them, or in a ``ring`` that shows each
    process one other's at a time; ``auto`` is a ring where all of them are above a GiB.
    """

    scale: Tensor

    def __init__(
        self,
        temperature: float,
        learn_temperature: bool,
        similarity: str,
        direction: str,
        hard_negative_weight: float,
        label_smoothing: float,
        key_exchange: str,
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise InputError(f"loss.temperature={temperature}: a number above 0 is needed, 0.05 in the paper.")
        if similarity not in SIMILARITIES:
            raise InputError(f"loss.similarity={similarity}: choose one of {', '.join(SIMILARITIES)}.")
        if direction not in DIRECTIONS:
            raise InputError(f"loss.direction={direction}: choose one of {', '.join(DIRECTIONS)}.")
        if not 0 <= label_smoothing < 1:
            raise InputError(f"loss.label_smoothing={label_smoothing}: 0 or more and below 1.")
        if key_exchange not in KEY_EXCHANGES:
            raise InputError(f"loss.key_exchange={key_exchange}: choose one of {', '.join(KEY_EXCHANGES)}.")
        scale = torch.tensor(-math.log(temperature))
        if learn_temperature:
            self.scale = nn.Parameter(scale)
        else:
            self.register_buffer("scale", scale)
        self.similarity = similarity
        self.direction = direction
        self.hard_negative_weight = hard_negative_weight
        self.label_smoothing = label_smoothing
        self.key_exchange = key_exchange

    def forward(self, anchors: Embeddings, keys: Embeddings) -> LossOutput:
        """Both ``z (V, N, D)`` with V at least 2. ``count`` is the number of anchor rows."""
        return self.combine(self.block_statistics(self.prepare(anchors), self.prepare(keys))[None])

    def temperature(self) -> Tensor:
        """The temperature, never below 0.01 (the bound of CLIP, where a learned one would run away)."""
        return torch.exp(-self.scale.clamp(max=math.log(100.0)))

    def prepare(self, side: Embeddings) -> Embeddings:
        """Rows whose dot products are the similarity."""
        return replace(side, z=prepare_for_similarity(side.z, self.similarity))

    def block_statistics(self, anchors: Embeddings, keys: Embeddings) -> Tensor:
        """What these keys, of ``ready`` rows, are to each anchor: ``(n, directions, 7)``, numbers of ``PARTS``."""
        blocks = len(keys.z) - 1 + (self.direction == "both")
        with torch.autocast(anchors.z.device.type, enabled=False):  # scores in half precision lose the small margins
            return apply_in_slices(self._table, anchors, keys, blocks)

    def combine(self, parts: Tensor) -> LossOutput:
        """The loss over all keys, of ``parts (B, n, directions, 7)`` of B blocks of them that together are all."""
        below, best = parts[..., 0].logsumexp(0), parts[..., 5].detach()
        hit = parts[..., 6].detach().gather(0, best.argmax(0, keepdim=True))[0]
        sought, positives, even, allowed = parts[..., 1:5].sum(0).unbind(-1)
        target = sought / positives
        if self.label_smoothing:
            target = (1 - self.label_smoothing) * target + self.label_smoothing * even / allowed
        count = below.new_tensor(len(below))
        temperature = self.temperature().detach() * len(below)
        stats = {"accuracy": torch.stack([hit[:, 0].sum(), count]), "temperature": torch.stack([temperature, count])}
        return LossOutput((below - target).mean(1).sum(), count, stats)

    def _table(self, anchors: Embeddings, keys: Embeddings) -> Tensor:
        ways = ((0, 1), (1, 0)) if self.direction == "both" else ((0, 1),)
        return torch.stack([self._rows(anchors, keys, a, b) for a, b in ways], 1)

    def _rows(self, anchors: Embeddings, keys: Embeddings, a: int, b: int) -> Tensor:
        """``(n, 7)`` of view ``a`` against view ``b``. Of ``n x N`` there is nothing but the scores."""
        n, views = len(keys), (b, *range(2, len(keys.z))) if a == 0 else (b,)
        columns = keys.z[b] if len(views) == 1 else keys.z[list(views)].flatten(0, 1)
        scores = (anchors.z[a] / self.temperature()) @ columns.T
        own = equal_pairs(anchors.example_id, keys.example_id)
        positive = _positives(anchors, keys, own)
        if self.hard_negative_weight and len(views) > 1:
            bonus = [(own[0], own[1] + n * block) for block in range(1, len(views))]
            where = tuple(torch.cat(side) for side in zip(*bonus, strict=True))
            scores = scores.index_put(where, scores.new_tensor(self.hard_negative_weight), accumulate=True)
        left_out = _left_out(anchors, keys, positive, views, (a, b))
        if len(left_out[0]):
            # Not -inf: of a block whose keys are all left out, the gradient would be no number.
            scores = scores.index_put(left_out, scores.new_tensor(torch.finfo(scores.dtype).min))
        best, at = scores.detach().max(1)
        hit = torch.zeros_like(best).index_put((positive[0],), (at[positive[0]] == positive[1]).to(best), accumulate=True)
        sought = torch.zeros_like(best).index_add(0, positive[0], scores[positive])
        even = scores.index_put(left_out, scores.new_zeros(())).sum(1) if self.label_smoothing else torch.zeros_like(best)
        counts = [_count(positive, best), even, scores.shape[1] - _count(left_out, best), best, hit]
        return torch.stack([scores.logsumexp(1), sought, *counts], 1)


Pairs = tuple[Tensor, Tensor]  # places (i, j) in a matrix, each once


def equal_pairs(x: Tensor, y: Tensor) -> Pairs:
    """Where ``x (n,)`` holds what ``y (N,)`` holds, without a matrix ``n x N``."""
    ordered, order = y.sort()
    first = torch.searchsorted(ordered, x)
    count = torch.searchsorted(ordered, x, right=True) - first
    row = torch.repeat_interleave(torch.arange(len(x), device=x.device), count)
    place = torch.arange(len(row), device=x.device) - torch.repeat_interleave(count.cumsum(0) - count, count)
    return row, order[torch.repeat_interleave(first, count) + place]


def _positives(anchors: Embeddings, keys: Embeddings, own: Pairs) -> Pairs:
    """The row's own key, and those of its label."""
    labelled = (anchors.label >= 0).nonzero()[:, 0]
    row, column = equal_pairs(anchors.label[labelled], keys.label)
    alone = anchors.label[own[0]] < 0
    return torch.cat([own[0][alone], labelled[row]]), torch.cat([own[1][alone], column])


def _left_out(anchors: Embeddings, keys: Embeddings, positive: Pairs, views: Sequence[int], ab: tuple[int, int]) -> Pairs:
    """Keys that hold what the anchor or its positive holds, and are no positives."""
    n = len(keys)
    width = n * len(views)
    found = [
        row * width + column + n * block
        for block, view in enumerate(views)
        for mine in dict.fromkeys(ab)
        for row, column in [equal_pairs(anchors.content_hash[mine], keys.content_hash[view])]
    ]
    places = torch.cat(found).unique()
    places = places[~torch.isin(places, positive[0] * width + positive[1])]
    return places // width, places % width


def _count(pairs: Pairs, like: Tensor) -> Tensor:
    """``(n,)`` how many there are in each row."""
    return torch.bincount(pairs[0], minlength=len(like)).to(like.dtype)


def prepare_for_similarity(z: Tensor, kind: str) -> Tensor:
    """``(..., D)`` in float32 at least, so that a dot product is the similarity: ``cosine`` or ``dot``."""
    z = z.float() if z.dtype in (torch.float16, torch.bfloat16) else z
    return F.normalize(z, dim=-1, eps=1e-6) if kind == "cosine" else z
