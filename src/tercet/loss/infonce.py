"""InfoNCE: tell the positive among all keys."""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tercet.contract import Embedded, Terms
from tercet.error import InputError
from tercet.loss.slices import in_slices

SIMILARITIES = ("cosine", "dot")
DIRECTIONS = ("forward", "both")


class InfoNCE(nn.Module):
    """Cross entropy of the positive among the keys: SimCSE's loss (Gao et al. 2021, arXiv:2104.08821).

    With s the similarity and t the temperature, the sum over anchor rows i of

        -1/|P(i)| · sum over p in P(i) of log( exp(s(i,p)/t) / sum over k of exp(s(i,k)/t) )      (their eq. 1)

    Anchors are view 0; keys are view 1 and, as negatives for everyone, views 2 and on (their eq. 5), whose logit on
    one's own row gets ``hard_negative_weight`` = log alpha added (their eq. 8). P(i) is the row's own key and, where
    there are labels, every key of the same label (SupCon, Khosla et al. 2020, arXiv:2004.11362, eq. 2). A key that is
    no positive but holds the same content as the anchor or its positive is left out.

    ``direction`` ``forward`` scores view 0 against view 1 as in the paper; ``both`` adds the mirror image (without
    hard negatives, which have no anchors of their own) and halves the sum, as CLIP does.
    """

    scale: Tensor

    def __init__(
        self,
        temperature: float,
        learn_temperature: bool,
        similarity: str,
        direction: str,
        hard_negative_weight: float,
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise InputError(f"loss.temperature={temperature}: a number above 0 is needed, 0.05 in the paper.")
        if similarity not in SIMILARITIES:
            raise InputError(f"loss.similarity={similarity}: choose one of {', '.join(SIMILARITIES)}.")
        if direction not in DIRECTIONS:
            raise InputError(f"loss.direction={direction}: choose one of {', '.join(DIRECTIONS)}.")
        scale = torch.tensor(-math.log(temperature))
        if learn_temperature:
            self.scale = nn.Parameter(scale)
        else:
            self.register_buffer("scale", scale)
        self.similarity = similarity
        self.direction = direction
        self.hard_negative_weight = hard_negative_weight

    def forward(self, anchors: Embedded, keys: Embedded) -> Terms:
        """Both ``z (V, N, D)`` with V at least 2. ``count`` is the number of anchor rows."""
        with torch.autocast(anchors.z.device.type, enabled=False):  # scores in half precision lose the small margins
            blocks = len(keys.z) - 1 + (self.direction == "both")
            return in_slices(self._terms, self._ready(anchors), self._ready(keys), blocks)

    def temperature(self) -> Tensor:
        """The temperature, never below 0.01 (the bound of CLIP, where a learned one would run away)."""
        return torch.exp(-self.scale.clamp(max=math.log(100.0)))

    def _ready(self, side: Embedded) -> Embedded:
        return replace(side, z=comparable(side.z, self.similarity))

    def _terms(self, anchors: Embedded, keys: Embedded) -> Terms:
        rows, right = self._rows(anchors, keys, 0, 1)
        if self.direction == "both":
            back, _ = self._rows(anchors, keys, 1, 0)
            rows = (rows + back) / 2
        count = rows.new_tensor(len(anchors))
        temperature = self.temperature().detach() * len(anchors)
        stats = {"accuracy": torch.stack([right, count]), "temperature": torch.stack([temperature, count])}
        return Terms(rows.sum(), count, stats)

    def _rows(self, anchors: Embedded, keys: Embedded, a: int, b: int) -> tuple[Tensor, Tensor]:
        """The loss of each anchor ``(n,)`` and the number whose best key is a positive ``()``."""
        own = anchors.uid[:, None] == keys.uid
        positive = own | ((anchors.label[:, None] == keys.label) & (anchors.label[:, None] >= 0))
        blocks, masks = [], []
        for view in (b, *range(2, len(keys.z))) if a == 0 else (b,):
            scores = anchors.z[a] @ keys.z[view].T / self.temperature()
            blocks.append(scores + self.hard_negative_weight * own if view >= 2 else scores)
            content = keys.content[view]
            same = (anchors.content[a][:, None] == content) | (anchors.content[b][:, None] == content)
            masks.append(same & ~positive if view == b else same)
        logits = torch.cat(blocks, 1).masked_fill(torch.cat(masks, 1), -math.inf)
        log_p = logits[:, : len(keys)] - logits.logsumexp(1, keepdim=True)
        rows = -log_p.masked_fill(~positive, 0).sum(1) / positive.sum(1)
        best = logits.detach().argmax(1, keepdim=True)
        right = F.pad(positive, (0, logits.shape[1] - len(keys))).gather(1, best).sum()
        return rows, right


def comparable(z: Tensor, kind: str) -> Tensor:
    """``(..., D)`` in float32 at least, so that a dot product is the similarity: ``cosine`` or ``dot``."""
    z = z.float() if z.dtype in (torch.float16, torch.bfloat16) else z
    return F.normalize(z, dim=-1, eps=1e-6) if kind == "cosine" else z
