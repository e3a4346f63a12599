"""InfoNCE: cross entropy of the positive among all keys."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tercet.errors import InputError, check_choice, require
from tercet.losses import base
from tercet.types import Embeddings, LossOutput

SIMILARITIES = ("cosine", "dot")
Pairs = tuple[Tensor, Tensor]  # positions (i, j) in a matrix, each once


class InfoNCE(nn.Module):
    """Cross entropy of the positive among the keys: SimCSE's loss (Gao et al. 2021, arXiv:2104.08821).

    With s the similarity and t the temperature, the sum over anchor rows i of

        -1/|P(i)| · sum over p in P(i) of log( exp(s(i,p)/t) / sum over k of exp(s(i,k)/t) )      (their eq. 1)

    Anchors are view 0; keys are view 1 and, as negatives for all anchors, views 2 and on (their eq. 5), whose logit on
    the anchor's own row gets ``hard_negative_weight`` = log alpha added (their eq. 8). P(i) is the row's own key and,
    where there are labels, every key of the same label. A key that is no positive is left out where it holds the same
    content as the anchor or its positive, or is the positive of a row with an equal anchor: of several answers to one
    question none is a negative of the question. With the question as the label all of them are positives.

    With one view this is SupCon (Khosla et al. 2020, arXiv:2004.11362, eq. 2): anchors and keys are the same rows, P(i)
    are the other rows of the label, and a row is no key of its own. A row without a positive is only a negative.

    ``similarity`` is "cosine" or "dot". ``label_smoothing`` is that of ``torch.nn.CrossEntropyLoss``. ``direction`` "both"
    adds the mirror image (view 1 against view 0, without hard negatives) and halves the sum, as in CLIP. ``key_exchange``
    "gather" takes all keys of other processes at once, "ring" those of one process at a time; "auto" is a ring where all
    keys together exceed a GiB.

    >>> loss, queries, documents = InfoNCE(temperature=1.0), torch.eye(4), torch.eye(4)
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
        require(temperature > 0, f"`temperature`={temperature}: a number above 0 is needed, 0.05 in the paper.")
        check_choice("similarity", similarity, SIMILARITIES)
        check_choice("direction", direction, ("forward", "both"))
        check_choice("key_exchange", key_exchange, ("auto", "gather", "ring"))
        require(0 <= label_smoothing < 1, f"`label_smoothing`={label_smoothing}: 0 or more and below 1.")
        scale = torch.tensor(-math.log(temperature))
        self.scale = nn.Parameter(scale) if learn_temperature else nn.Buffer(scale)
        self.similarity, self.direction, self.key_exchange = similarity, direction, key_exchange
        self.hard_negative_weight, self.label_smoothing = hard_negative_weight, label_smoothing
        self.needs_hard_negatives = hard_negative_weight != 0

    def forward(
        self, queries: Embeddings | Tensor, documents: Embeddings | Tensor | None = None,
        hard_negatives: Tensor | None = None, labels: base.Integers | None = None, *,
        ids: base.Integers | None = None, content: base.Integers | None = None,
    ) -> LossOutput | Tensor:  # fmt: skip
        """The mean over all processes, of tensors; the sum over anchors, of anchor and key ``Embeddings (V, n, D)``.

        ``queries (N, D)``; ``documents (N, D)``, their positives, may be left out where there are ``labels (N,)`` (below 0:
        none); ``hard_negatives (N, D)`` or ``(N, M, D)``. ``ids (N,)`` are equal for rows of one example, ``content (N,)`` or
        ``(V, N)`` for equal items, which are no negatives of each other; left out, all are distinct. The normalizer of a sum
        is the number of anchors that have a positive.
        """
        if isinstance(queries, Embeddings) and isinstance(documents, Embeddings):
            return self.combine(self.block_statistics(self.prepare(queries), self.prepare(documents))[None])
        z = base.check_embeddings("queries", queries)
        if documents is None and (labels is None or hard_negatives is not None):
            raise InputError("`documents`: positives (N, D) are needed; without `hard_negatives`, `labels` alone are enough.")
        views = [z] if documents is None else [z, base.check_embeddings("documents", documents, like=z)]
        if hard_negatives is not None:
            several = isinstance(hard_negatives, Tensor) and hard_negatives.dim() == 3 and len(hard_negatives) == len(z)
            negatives = hard_negatives.unbind(1) if several else [hard_negatives]
            views += [base.check_embeddings("hard_negatives", x, like=z) for x in negatives]
        return base.mean_loss(self, base.make_embeddings(torch.stack(views), ids, content, labels))

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
        directions = ((0, 0),) if len(keys.z) == 1 else ((0, 1), (1, 0)) if self.direction == "both" else ((0, 1),)

        def statistics(anchors: Embeddings, keys: Embeddings) -> Tensor:
            return torch.stack([self._one_direction(anchors, keys, a, b) for a, b in directions], 1)

        with torch.autocast(anchors.z.device.type, enabled=False):  # half precision loses small differences of logits
            return base.apply_in_slices(statistics, anchors, keys, max(1, len(keys.z) + len(directions) - 2))

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

    def _one_direction(self, anchors: Embeddings, keys: Embeddings, a: int, b: int) -> Tensor:
        """``(n, 7)`` of view ``a`` against view ``b``. The logits are the only tensor of size ``n x N``."""
        n, views = len(keys), (b, *range(2, len(keys.z))) if a == 0 else (b,)
        columns = keys.z[b] if len(views) == 1 else keys.z[list(views)].flatten(0, 1)
        logits = (anchors.z[a] / self.temperature()) @ columns.T
        own = equal_pairs(anchors.example_id, keys.example_id)
        positive = _positives(anchors, keys, own)
        if self.hard_negative_weight and len(views) > 1:
            where = own[0].repeat(len(views) - 1), torch.cat([own[1] + n * block for block in range(1, len(views))])
            logits = logits.index_put(where, logits.new_tensor(self.hard_negative_weight), accumulate=True)
        left_out = _left_out(anchors, keys, positive, own, views, a)
        if len(left_out[0]):
            # Not -inf: the gradient of a block whose keys are all left out would be NaN.
            logits = logits.index_put(left_out, logits.new_tensor(torch.finfo(logits.dtype).min))
        best, at = logits.detach().max(1)
        hit = torch.zeros_like(best).index_put((positive[0],), (at[positive[0]] == positive[1]).to(best), accumulate=True)
        positive_sum = torch.zeros_like(best).index_add(0, positive[0], logits[positive])
        logit_sum = torch.zeros_like(best)
        if self.label_smoothing:
            logit_sum = logits.index_put(left_out, logits.new_zeros(())).sum(1)
        positives, excluded = (torch.bincount(row, minlength=len(best)).to(best.dtype) for row in (positive[0], left_out[0]))
        allowed = logits.shape[1] - excluded
        return torch.stack([logits.logsumexp(1), positive_sum, positives, logit_sum, allowed, best, hit], 1)


def equal_pairs(x: Tensor, y: Tensor) -> Pairs:
    """The positions at which ``x (n,)`` equals ``y (N,)``, without a matrix: of [5, 7] and [7, 8, 7] (1, 0) and (1, 2)."""
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


def _left_out(anchors: Embeddings, keys: Embeddings, positive: Pairs, own: Pairs, views: Sequence[int], a: int) -> Pairs:
    """Keys that are no positives, but equal the anchor or its positive, or are the positive of an equal anchor.

    The first of ``views`` holds the positives; with one view the row itself is left out as well.
    """
    width = len(keys) * len(views)
    row, column = own if len(keys.z) == 1 else equal_pairs(anchors.content_hash[a], keys.content_hash[a])
    found = [row * width + column]
    for (block, view), mine in product(enumerate(views), {a, views[0]}):
        row, column = equal_pairs(anchors.content_hash[mine], keys.content_hash[view])
        found.append(row * width + column + len(keys) * block)
    places = torch.cat(found).unique()
    places = places[~torch.isin(places, positive[0] * width + positive[1])]
    return places // width, places % width


def prepare_for_similarity(z: Tensor, similarity: str) -> Tensor:
    """Transform ``z (..., D)`` so that a dot product is the similarity, "cosine" or "dot"; half precision becomes float32."""
    z = z.float() if z.dtype in (torch.float16, torch.bfloat16) else z
    return F.normalize(z, dim=-1, eps=1e-6) if similarity == "cosine" else z
