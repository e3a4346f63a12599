"""Quick-Thoughts' loss: tell the neighbouring sentences among all others."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from tercet.errors import InputError
from tercet.losses.blockwise import apply_in_slices
from tercet.losses.info_nce import SIMILARITIES, prepare_for_similarity
from tercet.types import Embeddings, LossOutput

SELF_LOGITS = ("excluded", "zero")
ACCURACIES = ("forward_accuracy", "backward_accuracy", "neighbour_accuracy")


class ContextLoss(nn.Module):
    """Cross entropy of a sentence's neighbours among the keys (Logeswaran and Lee 2018, arXiv:1803.02893, section 3).

    With s the similarity, t the temperature, f view 0 of the anchors and g the last view of the keys, the sum over
    anchor rows i that have a neighbour of

        -1/|C(i)| · sum over j in C(i) of log( exp(s(f_i, g_j)/t) / sum over k of exp(s(f_i, g_k)/t) )

    C(i) are the rows of the same document (``label``, none where -1) with 1 <= abs(position - position_i) <= ``context``.
    ``self_score`` says what the row's own key is: ``excluded``, or scored ``zero`` as in the authors' code. A key whose
    content equals that of the anchor or of one of its neighbours, and that is no neighbour itself, is left out.
    """

    def __init__(self, context: int, similarity: str, temperature: float, self_logit: str) -> None:
        super().__init__()
        if context < 1:
            raise InputError(f"loss.context={context}: 1 (the sentence before and the one after) or more.")
        if similarity not in SIMILARITIES:
            raise InputError(f"loss.similarity={similarity}: choose one of {', '.join(SIMILARITIES)}.")
        if not temperature > 0:
            raise InputError(f"loss.temperature={temperature}: a number above 0; 1 with loss.similarity=dot in the paper.")
        if self_logit not in SELF_LOGITS:
            raise InputError(f"loss.self_logit={self_logit}: choose one of {', '.join(SELF_LOGITS)}.")
        self.context = context
        self.similarity = similarity
        self.temperature = temperature
        self.self_logit = self_logit

    def forward(self, anchors: Embeddings, keys: Embeddings) -> LossOutput:
        """``anchors.z (V, n, D)``, ``keys.z (V, N, D)``; ``count`` is the number of anchors that have a neighbour."""
        with torch.autocast(anchors.z.device.type, enabled=False):
            ready = [replace(side, z=prepare_for_similarity(side.z, self.similarity)) for side in (anchors, keys)]
            return self._summed(apply_in_slices(self._table, ready[0], ready[1], 1))

    def _table(self, anchors: Embeddings, keys: Embeddings) -> Tensor:
        """``(n, 8)``: the loss of each anchor and whether it has a neighbour; then three hits, each with who could hit."""
        scores = anchors.z[0] @ keys.z[-1].T / self.temperature
        own = anchors.example_id[:, None] == keys.example_id
        step = self._steps(anchors, keys, own)
        near = (step.abs() <= self.context) & (step != 0)
        scores = scores.masked_fill(own, -torch.inf if self.self_logit == "excluded" else 0.0)
        scores = scores.masked_fill(_copies(anchors, keys, near) & ~near & ~own, -torch.inf)
        has = near.any(1)
        # A row of nothing but itself would be all -inf, and its gradient no number.
        log_p = torch.where(has[:, None], scores, 0.0).log_softmax(1)
        rows = -log_p.masked_fill(~near, 0).sum(1) / near.sum(1).clamp_min(1)
        return torch.stack([rows, has.to(rows.dtype), *self._hits(scores.detach(), step, near)], 1)

    def _summed(self, table: Tensor) -> LossOutput:
        total, count, *pairs = table.sum(0)
        return LossOutput(total, count, dict(zip(ACCURACIES, torch.stack(pairs).detach().view(-1, 2), strict=True)))

    def _steps(self, anchors: Embeddings, keys: Embeddings, own: Tensor) -> Tensor:
        """``(n, N)`` how far a key stands behind the anchor in its document; 0 for itself and for all other documents."""
        same = (anchors.label[:, None] == keys.label) & (anchors.label[:, None] >= 0) & ~own
        return (keys.position - anchors.position[:, None]).masked_fill(~same, 0)

    def _hits(self, scores: Tensor, step: Tensor, near: Tensor) -> list[Tensor]:
        """Is the best key the next sentence, the one before, any neighbour; and is there such a one? ``(n,)`` each."""
        best = scores.argmax(1, keepdim=True) if scores.shape[1] else scores.new_zeros(len(scores), 0, dtype=torch.long)
        sought = (step == 1, step == -1, near)
        return [x.to(scores.dtype) for wanted in sought for x in (wanted.gather(1, best).any(1), wanted.any(1))]


def _copies(anchors: Embeddings, keys: Embeddings, near: Tensor) -> Tensor:
    """``(n, N)`` does a key hold what the anchor or one of its neighbours holds?"""
    _, group = keys.content_hash[-1].unique(return_inverse=True)
    held = torch.zeros(len(anchors), len(keys), dtype=torch.int32, device=near.device)
    held = held.index_add_(1, group, near.to(torch.int32))  # how many neighbours hold each content
    return (held[:, group] > 0) | (anchors.content_hash[0][:, None] == keys.content_hash[-1])
