"""InfoNCE: cross entropy of the positive among all keys."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tercet.errors import InputError, check_choice
from tercet.losses import base
from tercet.types import Embeddings, LossOutput

SIMILARITIES = ("cosine", "dot")
DIRECTIONS = ("forward", "both")
KEY_EXCHANGES = ("auto", "gather", "ring")


class InfoNCE(nn.Module):
    """Cross entropy of the positive among the keys: SimCSE's loss (Gao et al. 2021, arXiv:2104.08821).

    With s the similarity and t the temperature, the sum over anchor rows i of

        -1/|P(i)| · sum over p in P(i) of log( exp(s(i,p)/t) / sum over k of exp(s(i,k)/t) )      (their eq. 1)

    Anchors are view 0; keys are view 1 and, as negatives for all anchors, views 2 and on (their eq. 5), whose logit on
    the anchor's own row gets ``hard_negative_weight`` = log alpha added (their eq. 8). P(i) is the row's own key and,
    where there are labels, every key of the same label. A key that is no positive but holds the same content as the
    anchor or its positive is left out.

    With one view this is SupCon (Khosla et al. 2020, arXiv:2004.11362, eq. 2): anchors and keys are the same rows, P(i)
    are the other rows of the label, and a row is no key of its own. A row without a positive is a negative for others,
    has no loss, and does not count in the mean.

    ``similarity`` is "cosine" or "dot". ``label_smoothing`` spreads this share of the target evenly over all keys that
    are not left out, as that of ``torch.nn.CrossEntropyLoss`` does. With ``direction`` "both" the mirror image (view 1
    against view 0, without hard negatives) is added and the sum halved, as in CLIP.

    ``key_exchange`` is how keys come from other processes: "gather" all of them, or in a "ring" that holds the keys of
    one other process at a time; "auto" is a ring where all keys together exceed a GiB.

    >>> queries, documents = torch.eye(4), torch.eye(4)
    >>> loss = InfoNCE(temperature=1.0)
    >>> round(float(loss(queries, documents)), 4)  # log(e + 3) - 1
    0.7437
    >>> round(float(loss(queries, documents, hard_negatives=-torch.eye(4))), 4)
    1.2068
    >>> round(float(loss(torch.eye(4), labels=[0, 0, 1, 1])), 4)  # SupCon, log(3)
    1.0986
    """

    positives: ClassVar[frozenset[str]] = frozenset({"example", "label"})
    scale: Tensor

    def __init__(
        self, temperature: float = 0.05, learn_temperature: bool = False, similarity: str = "cosine",
        direction: str = "forward", hard_negative_weight: float = 0.0, label_smoothing: float = 0.0,
        key_exchange: str = "auto",
    ) -> None:  # fmt: skip
        super().__init__()
        if not temperature > 0:
            raise InputError(f"`temperature`={temperature}: a number above 0 is needed, 0.05 in the paper.")
        check_choice("similarity", similarity, SIMILARITIES)
        check_choice("direction", direction, DIRECTIONS)
        check_choice("key_exchange", key_exchange, KEY_EXCHANGES)
        if not 0 <= label_smoothing < 1:
            raise InputError(f"`label_smoothing`={label_smoothing}: 0 or more and below 1.")
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

    @property
    def needs_hard_negatives(self) -> bool:
        """Whether a setting has no effect without a third column."""
        return self.hard_negative_weight != 0

    def forward(
        self, queries: Embeddings | Tensor, documents: Embeddings | Tensor | None = None,
        hard_negatives: Tensor | None = None, labels: base.Integers | None = None, *,
        ids: base.Integers | None = None, content: base.Integers | None = None,
    ) -> LossOutput | Tensor:  # fmt: skip
        """The mean over all processes, of tensors; the sum over anchors, of anchor and key ``Embeddings``.

        ``queries (N, D)``; ``documents (N, D)``, their positives, may be left out where there are ``labels (N,)`` (below 0:
        none); ``hard_negatives (N, D)`` or ``(N, M, D)``. ``ids (N,)`` are equal for rows of one example, ``content (N,)`` or
        ``(V, N)`` for equal items, which are no negatives of each other; left out, all are distinct.

        Of ``Embeddings (V, n, D)`` and ``(V, N, D)`` the normalizer is the number of anchors that have a positive.
        """
        if isinstance(queries, Embeddings) and isinstance(documents, Embeddings):
            statistics = self.block_statistics(self.prepare(queries), self.prepare(documents))
            return self.combine(statistics[None])
        z = base.check_embeddings("queries", queries)
        views = [z]
        if documents is not None:
            views.append(base.check_embeddings("documents", documents, like=z))
        elif labels is None or hard_negatives is not None:
            raise InputError(
                "`documents`: the positive of each query is needed (N, D). Only without `hard_negatives`, `labels` alone "
                "are enough: rows of one label are then each other's positives."
            )
        if hard_negatives is not None:
            several = isinstance(hard_negatives, Tensor) and hard_negatives.dim() == 3 and len(hard_negatives) == len(z)
            negatives = hard_negatives.unbind(1) if several else [hard_negatives]
            views += [base.check_embeddings("hard_negatives", x, like=z) for x in negatives]
        label = None if labels is None else base.check_integers("labels", labels, z, (len(z),))
        return base.mean_loss(self, base.make_embeddings(torch.stack(views), label, None, ids, content))

    def temperature(self) -> Tensor:
        """The temperature, never below 0.01 (CLIP's bound, which keeps a learned one from vanishing)."""
        return torch.exp(-self.scale.clamp(max=math.log(100.0)))

    def prepare(self, side: Embeddings) -> Embeddings:
        """Transform rows so that their dot products are the similarity."""
        return replace(side, z=prepare_for_similarity(side.z, self.similarity))

    def block_statistics(self, anchors: Embeddings, keys: Embeddings) -> Tensor:
        """Statistics ``(n, directions, 7)`` of each anchor over these keys, both of prepared rows.

        The log of the sum of exp of all logits; the sum and the number of the positives' logits; the sum (only under label
        smoothing) and the number of all logits that are not left out; the largest logit, and 1 where it is a positive's.
        """
        blocks = max(1, len(keys.z) - 1 + (self.direction == "both"))
        with torch.autocast(anchors.z.device.type, enabled=False):  # half precision loses small differences of logits
            return base.apply_in_slices(self._statistics, anchors, keys, blocks)

    def combine(self, statistics: Tensor) -> LossOutput:
        """The loss over all keys, of the ``block_statistics (B, n, directions, 7)`` of B blocks that together are all keys."""
        log_denominator, best = statistics[..., 0].logsumexp(0), statistics[..., 5].detach()
        hit = statistics[..., 6].detach().gather(0, best.argmax(0, keepdim=True))[0]
        positive_sum, positives, logit_sum, allowed = statistics[..., 1:5].sum(0).unbind(-1)
        has_positive = positives > 0  # all rows, unless there is one view
        target = positive_sum / positives.clamp(min=1)
        if self.label_smoothing:
            target = (1 - self.label_smoothing) * target + self.label_smoothing * logit_sum / allowed.clamp(min=1)
        rows = (log_denominator - target).masked_fill(~has_positive, 0)
        count = has_positive[:, 0].sum().to(rows.dtype)
        accuracy = torch.stack([(hit[:, 0] * has_positive[:, 0]).sum(), count])
        temperature = torch.stack([self.temperature().detach() * len(rows), count.new_tensor(len(rows))])
        return LossOutput(rows.mean(1).sum(), count, {"accuracy": accuracy, "temperature": temperature})

    def _statistics(self, anchors: Embeddings, keys: Embeddings) -> Tensor:
        if len(keys.z) == 1:
            return self._one_direction(anchors, keys, 0, 0)[:, None]
        directions = ((0, 1), (1, 0)) if self.direction == "both" else ((0, 1),)
        return torch.stack([self._one_direction(anchors, keys, a, b) for a, b in directions], 1)

    def _one_direction(self, anchors: Embeddings, keys: Embeddings, a: int, b: int) -> Tensor:
        """``(n, 7)`` of view ``a`` against view ``b``. The logits are the only tensor of size ``n x N``."""
        n, views = len(keys), (b, *range(2, len(keys.z))) if a == 0 else (b,)
        columns = keys.z[b] if len(views) == 1 else keys.z[list(views)].flatten(0, 1)
        logits = (anchors.z[a] / self.temperature()) @ columns.T
        own = equal_pairs(anchors.example_id, keys.example_id)
        positive = _positives(anchors, keys, own)
        if self.hard_negative_weight and len(views) > 1:
            bonus = [(own[0], own[1] + n * block) for block in range(1, len(views))]
            where = tuple(torch.cat(side) for side in zip(*bonus, strict=True))
            logits = logits.index_put(where, logits.new_tensor(self.hard_negative_weight), accumulate=True)
        left_out = _left_out(anchors, keys, positive, own, views, (a, b))
        if len(left_out[0]):
            # Not -inf: the gradient of a block whose keys are all left out would be NaN.
            logits = logits.index_put(left_out, logits.new_tensor(torch.finfo(logits.dtype).min))
        best, at = logits.detach().max(1)
        hit = torch.zeros_like(best).index_put((positive[0],), (at[positive[0]] == positive[1]).to(best), accumulate=True)
        positive_sum = torch.zeros_like(best).index_add(0, positive[0], logits[positive])
        smooth = bool(self.label_smoothing)
        logit_sum = logits.index_put(left_out, logits.new_zeros(())).sum(1) if smooth else torch.zeros_like(best)
        allowed = logits.shape[1] - _count(left_out, best)
        return torch.stack([logits.logsumexp(1), positive_sum, _count(positive, best), logit_sum, allowed, best, hit], 1)


Pairs = tuple[Tensor, Tensor]  # positions (i, j) in a matrix, each once


def equal_pairs(x: Tensor, y: Tensor) -> Pairs:
    """The positions (i, j) at which ``x (n,)`` equals ``y (N,)``, without a matrix ``n x N``.

    >>> [index.tolist() for index in equal_pairs(torch.tensor([5, 7]), torch.tensor([7, 8, 7]))]
    [[1, 1], [0, 2]]
    """
    ordered, order = y.sort()
    first = torch.searchsorted(ordered, x)
    count = torch.searchsorted(ordered, x, right=True) - first
    row = torch.repeat_interleave(torch.arange(len(x), device=x.device), count)
    place = torch.arange(len(row), device=x.device) - torch.repeat_interleave(count.cumsum(0) - count, count)
    return row, order[torch.repeat_interleave(first, count) + place]


def _positives(anchors: Embeddings, keys: Embeddings, own: Pairs) -> Pairs:
    """The row's own key and those of its label; with one view those of its label that are not its own."""
    labeled = (anchors.label >= 0).nonzero()[:, 0]
    row, column = equal_pairs(anchors.label[labeled], keys.label)
    row = labeled[row]
    if len(keys.z) == 1:
        other = anchors.example_id[row] != keys.example_id[column]
        return row[other], column[other]
    alone = anchors.label[own[0]] < 0
    return torch.cat([own[0][alone], row]), torch.cat([own[1][alone], column])


def _left_out(
    anchors: Embeddings, keys: Embeddings, positive: Pairs, own: Pairs, views: Sequence[int], ab: tuple[int, int]
) -> Pairs:
    """Keys that hold the content of the anchor or its positive and are no positives; with one view also the row itself."""
    n = len(keys)
    width = n * len(views)
    found = [
        row * width + column + n * block
        for block, view in enumerate(views)
        for mine in dict.fromkeys(ab)
        for row, column in [equal_pairs(anchors.content_hash[mine], keys.content_hash[view])]
    ]
    if len(keys.z) == 1:
        found.append(own[0] * width + own[1])
    places = torch.cat(found).unique()
    places = places[~torch.isin(places, positive[0] * width + positive[1])]
    return places // width, places % width


def _count(pairs: Pairs, like: Tensor) -> Tensor:
    """``(n,)``, the number of pairs in each row."""
    return torch.bincount(pairs[0], minlength=len(like)).to(like.dtype)


def prepare_for_similarity(z: Tensor, similarity: str) -> Tensor:
    """Transform ``z (..., D)`` so that a dot product is the similarity, "cosine" or "dot"; half precision becomes float32."""
    z = z.float() if z.dtype in (torch.float16, torch.bfloat16) else z
    return F.normalize(z, dim=-1, eps=1e-6) if similarity == "cosine" else z
