"""The sigmoid loss of SigLIP (Zhai et al. 2023, arXiv:2303.15343, eq. 1)."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tercet.errors import InputError
from tercet.types import Embeddings, LossOutput


class SigmoidLoss(nn.Module):
    """Classify each pair of an anchor's first view and a key's second view: are they of one example, or of one label?

    ``scale`` and ``bias`` are the paper's t and b.
    """

    positives: ClassVar[frozenset[str]] = frozenset({"example", "label"})
    needs_hard_negatives: ClassVar[bool] = False

    def __init__(self, scale: float = 10.0, bias: float = -10.0) -> None:
        super().__init__()
        if not scale > 0:
            raise InputError(f"`scale`={scale}: a positive number is needed; 10 in the paper.")
        self.scale, self.bias = scale, bias

    def forward(self, anchors: Embeddings, keys: Embeddings) -> LossOutput:
        """Sum over anchors: ``z (V, N, D)`` against ``z (V, M, D)``."""
        dtype = torch.promote_types(anchors.z.dtype, torch.float32)
        with torch.autocast(anchors.z.device.type, enabled=False):
            x, y = F.normalize(anchors.z[0].to(dtype), dim=-1), F.normalize(keys.z[1].to(dtype), dim=-1)
            sign = torch.where(self._positive(anchors, keys), 1.0, -1.0)
            total = -F.logsigmoid(sign * (self.scale * x @ y.T + self.bias)).sum()
        # The other views take part with a gradient of zero, so that each process reduces the same parameters.
        return LossOutput(total + 0 * anchors.z.sum(), anchors.z.new_tensor(float(len(anchors))))

    @staticmethod
    def _positive(anchors: Embeddings, keys: Embeddings) -> Tensor:
        label = (anchors.label[:, None] == keys.label) & (anchors.label[:, None] >= 0)
        return label | (anchors.example_id[:, None] == keys.example_id)
