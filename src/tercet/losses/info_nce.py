"""InfoNCE: cross entropy of the positive among all keys."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tercet.errors import InputError, check_choice, require
from tercet.losses import base
from tercet.losses.cross_entropy import MaskFunction, Masks, block_statistics, cross_entropy
from tercet.types import Embeddings, LossOutput, at_least_float32

SIMILARITIES = ("cosine", "dot")


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
            anchors = self.prepare(queries)
            keys = anchors if documents is queries else self.prepare(documents)
            with torch.autocast(anchors.z.device.type, enabled=False):  # half precision loses small differences of logits
                temperature = self.temperature()
                sums = [cross_entropy(*self._direction(anchors, keys, temperature, *ab)) for ab in self._directions(keys)]
            loss_sum = sums[0][0] if len(sums) == 1 else (sums[0][0] + sums[1][0]) / 2
            return self._output(loss_sum, sums[0][1][0], temperature, len(anchors))
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
        """``cross_entropy.block_statistics (n, directions, 7)`` over these keys; both are prepared rows."""
        with torch.autocast(anchors.z.device.type, enabled=False):
            arguments = (self._direction(anchors, keys, self.temperature(), *ab) for ab in self._directions(keys))
            return torch.stack([block_statistics(*those) for those in arguments], 1)

    def combine(self, statistics: Tensor) -> LossOutput:
        """The loss over all keys, of the ``block_statistics (B, n, directions, 7)`` of B blocks that together are all keys."""
        log_denominator, best = statistics[..., 0].logsumexp(0), statistics[..., 5].detach()
        hit = statistics[..., 6].detach().gather(0, best.argmax(0, keepdim=True))[0]
        positive_sum, positives, logit_sum, allowed = statistics[..., 1:5].sum(0).unbind(-1)
        has_positive = positives > 0
        target = (1 - self.label_smoothing) * positive_sum / positives.clamp(min=1)
        if self.label_smoothing:
            target = target + self.label_smoothing * logit_sum / allowed.clamp(min=1)
        rows = (log_denominator - target).masked_fill(~has_positive, 0)
        accuracy = torch.stack([(hit[:, 0] * has_positive[:, 0]).sum(), has_positive[:, 0].sum().to(hit.dtype)])
        return self._output(rows.mean(1).sum(), accuracy, self.temperature(), len(rows))

    @staticmethod
    def _output(loss_sum: Tensor, accuracy: Tensor, temperature: Tensor, n: int) -> LossOutput:
        mean = torch.stack([temperature.detach() * n, accuracy.new_full((), n)])
        return LossOutput(loss_sum, accuracy[1], {"accuracy": accuracy, "temperature": mean})

    def _directions(self, keys: Embeddings) -> Sequence[tuple[int, int]]:
        """The views (a, b) of anchors and positives."""
        return ((0, 0),) if len(keys.z) == 1 else ((0, 1), (1, 0)) if self.direction == "both" else ((0, 1),)

    def _direction(
        self, anchors: Embeddings, keys: Embeddings, temperature: Tensor, a: int, b: int
    ) -> tuple[Tensor, Tensor, MaskFunction, float]:
        """Arguments of ``cross_entropy``: view ``a`` against view ``b`` and, where a is the first, the hard negatives."""
        y = keys.z[1:].flatten(0, 1) if a == 0 and len(keys.z) > 1 else keys.z[b]
        theirs = base.positive_group(keys)
        mine = theirs if anchors is keys else base.positive_group(anchors)
        masks = partial(_masks, anchors, keys, (mine, theirs), a, b, self.hard_negative_weight)
        return anchors.z[a] / temperature, y, masks, self.label_smoothing


def _masks(
    anchors: Embeddings, keys: Embeddings, groups: tuple[Tensor, Tensor], a: int, b: int, weight: float,
    rows: slice, logits: Tensor,
) -> Masks:  # fmt: skip
    """Which keys are positives, and which are left out; adds ``weight`` to the logits of the anchors' own hard negatives.

    Positives are the row's own key and those of its label; with one view, those of its label that are not its own. Left out
    are keys that are no positives, but equal the anchor or its positive, or are the positive of an equal anchor.
    """
    content, theirs = anchors.content_hash[:, rows, None], keys.content_hash
    positive = groups[0][rows, None] == groups[1]
    if a == b:
        own = anchors.example_id[rows, None] == keys.example_id
        positive = positive > own
        return Masks(positive, (own | (content[0] == theirs[0])) > positive)
    left_out = (content[a] == theirs[a]).logical_or_(content[a] == theirs[b]).logical_or_(content[b] == theirs[b])
    left_out = left_out > positive
    if a == 0 and len(theirs) > 2:
        hard = (content[0, :, None] == theirs[2:]).logical_or_(content[1, :, None] == theirs[2:])
        left_out = torch.cat([left_out[:, None], hard], 1).flatten(1)
        if weight:
            own = anchors.example_id[rows, None] == keys.example_id
            logits[:, len(keys) :].unflatten(1, hard.shape[1:]).add_(own[:, None], alpha=weight)
    return Masks(positive, left_out)


def prepare_for_similarity(z: Tensor, similarity: str) -> Tensor:
    """Transform ``z (..., D)`` so that a dot product is the similarity, "cosine" or "dot"; half precision becomes float32."""
    z = at_least_float32(z)
    return F.normalize(z, dim=-1, eps=1e-6) if similarity == "cosine" else z
