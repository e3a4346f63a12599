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
EXCHANGES = ("auto", "gather", "ring")
# Of an anchor and some keys: log of the sum of exp of all scores; sum and number of the positives' scores; sum and number
# of all that are not left out; the best score, and whether a positive has it.
PARTS = ("below", "sought", "positives", "even", "allowed", "best", "hit")


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
        exchange: str,
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
        if exchange not in EXCHANGES:
            raise InputError(f"loss.exchange={exchange}: choose one of {', '.join(EXCHANGES)}.")
        scale = torch.tensor(-math.log(temperature))
        if learn_temperature:
            self.scale = nn.Parameter(scale)
        else:
            self.register_buffer("scale", scale)
        self.similarity = similarity
        self.direction = direction
        self.hard_negative_weight = hard_negative_weight
        self.label_smoothing = label_smoothing
        self.exchange = exchange

    def forward(self, anchors: Embedded, keys: Embedded) -> Terms:
        """Both ``z (V, N, D)`` with V at least 2. ``count`` is the number of anchor rows."""
        return self.merged(self.parts(self.ready(anchors), self.ready(keys))[None])

    def temperature(self) -> Tensor:
        """The temperature, never below 0.01 (the bound of CLIP, where a learned one would run away)."""
        return torch.exp(-self.scale.clamp(max=math.log(100.0)))

    def ready(self, side: Embedded) -> Embedded:
        """Rows whose dot products are the similarity."""
        return replace(side, z=comparable(side.z, self.similarity))

    def parts(self, anchors: Embedded, keys: Embedded) -> Tensor:
        """What these keys, of ``ready`` rows, are to each anchor: ``(n, directions, 7)``, numbers of ``PARTS``."""
        blocks = len(keys.z) - 1 + (self.direction == "both")
        with torch.autocast(anchors.z.device.type, enabled=False):  # scores in half precision lose the small margins
            return in_slices(self._table, anchors, keys, blocks)

    def merged(self, parts: Tensor) -> Terms:
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
        return Terms((below - target).mean(1).sum(), count, stats)

    def _table(self, anchors: Embedded, keys: Embedded) -> Tensor:
        ways = ((0, 1), (1, 0)) if self.direction == "both" else ((0, 1),)
        return torch.stack([self._rows(anchors, keys, a, b) for a, b in ways], 1)

    def _rows(self, anchors: Embedded, keys: Embedded, a: int, b: int) -> Tensor:
        """``(n, 7)`` of view ``a`` against view ``b``."""
        own = anchors.uid[:, None] == keys.uid
        positive = own | ((anchors.label[:, None] == keys.label) & (anchors.label[:, None] >= 0))
        blocks, masks = [], []
        for view in (b, *range(2, len(keys.z))) if a == 0 else (b,):
            scores = anchors.z[a] @ keys.z[view].T / self.temperature()
            blocks.append(scores + self.hard_negative_weight * own if view >= 2 else scores)
            content = keys.content[view]
            same = (anchors.content[a][:, None] == content) | (anchors.content[b][:, None] == content)
            masks.append(same & ~positive if view == b else same)
        logits, left_out = torch.cat(blocks, 1), torch.cat(masks, 1)
        # Not -inf: of a block whose keys are all left out, the gradient would be no number.
        logits = logits.masked_fill(left_out, torch.finfo(logits.dtype).min)
        best, at = logits.detach().max(1, keepdim=True)
        hit = F.pad(positive, (0, logits.shape[1] - len(keys))).gather(1, at)
        sought = logits[:, : len(keys)].masked_fill(~positive, 0).sum(1)
        even = logits.masked_fill(left_out, 0).sum(1) if self.label_smoothing else torch.zeros_like(sought)
        counts = [positive.sum(1), even, (~left_out).sum(1), best[:, 0], hit[:, 0]]
        return torch.stack([logits.logsumexp(1), sought, *(x.to(sought.dtype) for x in counts)], 1)


def comparable(z: Tensor, kind: str) -> Tensor:
    """``(..., D)`` in float32 at least, so that a dot product is the similarity: ``cosine`` or ``dot``."""
    z = z.float() if z.dtype in (torch.float16, torch.bfloat16) else z
    return F.normalize(z, dim=-1, eps=1e-6) if kind == "cosine" else z
