"""The loss of Quick-Thoughts: cross entropy of the neighboring sentences among all others."""

from dataclasses import replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from tercet.errors import InputError, check_choice, require
from tercet.losses import base
from tercet.losses.cross_entropy import Masks, cross_entropy
from tercet.losses.info_nce import SIMILARITIES, prepare_for_similarity
from tercet.types import Embeddings, LossOutput

ACCURACIES = ("neighbor_accuracy", "forward_accuracy", "backward_accuracy")


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
                anchors = replace(z, z=prepare_for_similarity(z.z, self.similarity))
                keys = anchors if z is documents else replace(documents, z=prepare_for_similarity(documents.z, self.similarity))
                masks, x = partial(self._masks, anchors, keys), anchors.z[0] / self.temperature
                loss_sum, counts = cross_entropy(x, keys.z[-1], masks, wanted=2)
                return LossOutput(loss_sum, counts[0, 1], dict(zip(ACCURACIES, counts, strict=True)))
        z = base.check_embeddings("z", z, views=True)
        require(z.dim() == 2 or len(z) <= 2, f"`z`: one or two vectors of each sentence are needed, got {tuple(z.shape)}.")
        if documents is None or positions is None or isinstance(documents, Embeddings):
            raise InputError("`positions`: the position of each row in its document, and `documents`, are needed, (N,) each.")
        z = z.expand(2, *z.shape[-2:])
        return base.mean_loss(self, base.make_embeddings(z, ids, content, documents, positions, "documents"))

    def _masks(self, anchors: Embeddings, keys: Embeddings, rows: slice, logits: Tensor) -> Masks:
        own = anchors.example_id[rows, None] == keys.example_id
        label, content = anchors.label[rows, None], keys.content_hash[-1]
        same = ((label == keys.label) & (label >= 0)) > own
        step = (keys.position - anchors.position[rows, None]).masked_fill_(~same, 0)
        near = (step.abs() <= self.context) & (step != 0)
        group = torch.searchsorted(content.sort()[0], content)  # the same number for equal contents
        holders = torch.zeros(near.shape, dtype=torch.int32, device=near.device)
        holders.index_add_(1, group, near.to(torch.int32))  # how many of the anchor's neighbors hold each content
        copies = (holders.index_select(1, group) > 0) | (anchors.content_hash[0, rows, None] == content)
        wanted = (step == 1, step == -1)
        if self.self_logit == "excluded":
            return Masks(near, (copies | own) > near, None, wanted)
        logits.masked_fill_(own, 0.0)
        return Masks(near, copies > (near | own), own, wanted)
