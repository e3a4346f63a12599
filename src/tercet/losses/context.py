"""The loss of Quick-Thoughts: cross entropy of the neighboring sentences among all others."""

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from tercet.errors import InputError, check_choice, require
from tercet.losses import base
from tercet.losses.info_nce import SIMILARITIES, prepare_for_similarity
from tercet.types import Embeddings, LossOutput

ACCURACIES = ("forward_accuracy", "backward_accuracy", "neighbor_accuracy")


class ContextLoss(nn.Module):
    """Cross entropy of a sentence's neighbors among the keys (Logeswaran and Lee 2018, arXiv:1803.02893, section 3).

    With s the similarity ("dot" or "cosine"), t the temperature, f view 0 of the anchors and g the last view of the keys,
    the sum over anchor rows i that have a neighbor of

        -1/|C(i)| · sum over j in C(i) of log( exp(s(f_i, g_j)/t) / sum over k of exp(s(f_i, g_k)/t) )

    C(i) are the rows of the same document (``label``; none where it is below 0) with
    1 <= abs(position - position_i) <= ``context``. A key whose content equals that of the anchor or of one of its
    neighbors, and that is no neighbor itself, is left out. ``self_logit`` is the logit of the row's own key: "excluded",
    or "zero" as in the authors' code.

    >>> z, documents, positions = torch.eye(3), [0, 0, 0], [0, 1, 2]
    >>> round(float(ContextLoss()(z, documents, positions)), 4)  # all logits are equal: log(2)
    0.6931
    """

    positives: ClassVar[frozenset[str]] = frozenset({"position"})
    needs_hard_negatives: ClassVar[bool] = False

    def __init__(
        self, context: int = 1, similarity: str = "dot", temperature: float = 1.0, self_logit: str = "excluded"
    ) -> None:
        super().__init__()
        check_choice("similarity", similarity, SIMILARITIES)
        check_choice("self_logit", self_logit, ("excluded", "zero"))
        require(context >= 1, f"`context`={context}: 1 (the sentence before and the one after) or more.")
        require(temperature > 0, f"`temperature`={temperature}: a number above 0; 1 with `similarity`=dot in the paper.")
        self.context, self.similarity, self.temperature, self.self_logit = context, similarity, temperature, self_logit

    def forward(
        self, z: Embeddings | Tensor, documents: Embeddings | base.Integers, positions: base.Integers | None = None, *,
        ids: base.Integers | None = None, content: base.Integers | None = None,
    ) -> LossOutput | Tensor:  # fmt: skip
        """The mean over all processes, of tensors; the sum over anchors, of anchor and key ``Embeddings (V, n, D)``.

        ``z (N, D)`` or, with f and g of each sentence, ``(2, N, D)``; ``documents (N,)``, the document of each row (below 0:
        none), and ``positions (N,)``, its position there. ``ids (N,)`` are equal for copies of one row, ``content (N,)`` for
        equal sentences; left out, all are distinct. The normalizer of a sum is the number of anchors that have a neighbor.
        """
        if isinstance(z, Embeddings) and isinstance(documents, Embeddings):
            with torch.autocast(z.z.device.type, enabled=False):
                anchors, keys = (replace(side, z=prepare_for_similarity(side.z, self.similarity)) for side in (z, documents))
                loss_sum, count, *hits = base.apply_in_slices(self._statistics, anchors, keys, 1).sum(0)
                stats = dict(zip(ACCURACIES, torch.stack(hits).detach().view(-1, 2), strict=True))
                return LossOutput(loss_sum, count, stats)
        z = base.check_embeddings("z", z, views=True)
        require(z.dim() == 2 or len(z) <= 2, f"`z`: one or two vectors of each sentence are needed, got {tuple(z.shape)}.")
        if documents is None or positions is None or isinstance(documents, Embeddings):
            raise InputError("`positions`: the position of each row in its document, and `documents`, are needed, (N,) each.")
        z = z.expand(2, *z.shape[-2:])
        return base.mean_loss(self, base.make_embeddings(z, ids, content, documents, positions, "documents"))

    def _statistics(self, anchors: Embeddings, keys: Embeddings) -> Tensor:
        """``(n, 8)``: the loss, whether there is a neighbor; for each of ``ACCURACIES`` a hit, and whether it is possible."""
        scores = anchors.z[0] @ keys.z[-1].T / self.temperature
        own = anchors.example_id[:, None] == keys.example_id
        same = (anchors.label[:, None] == keys.label) & (anchors.label[:, None] >= 0) & ~own
        step = (keys.position - anchors.position[:, None]).masked_fill(~same, 0)
        near = (step.abs() <= self.context) & (step != 0)
        scores = scores.masked_fill(own, -torch.inf if self.self_logit == "excluded" else 0.0)
        _, group = keys.content_hash[-1].unique(return_inverse=True)
        holders = torch.zeros(near.shape, dtype=torch.int32, device=near.device)
        holders.index_add_(1, group, near.to(torch.int32))  # how many of the anchor's neighbors hold each content
        copies = (holders[:, group] > 0) | (anchors.content_hash[0][:, None] == keys.content_hash[-1])
        scores = scores.masked_fill(copies & ~near & ~own, -torch.inf)
        has = near.any(1)
        # In a row whose only key is itself all scores would be -inf, and the gradient NaN.
        log_p = torch.where(has[:, None], scores, 0.0).log_softmax(1)
        rows = -log_p.masked_fill(~near, 0).sum(1) / near.sum(1).clamp_min(1)
        best = scores.detach().argmax(1, keepdim=True) if len(keys) else own.new_zeros(len(own), 0, dtype=torch.long)
        hits = [x for wanted in (step == 1, step == -1, near) for x in (wanted.gather(1, best).any(1), wanted.any(1))]
        return torch.stack([rows, *(x.to(rows.dtype) for x in (has, *hits))], 1)
