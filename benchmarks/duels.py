"""Who computes what: two losses, each by us and by a library that defines the same."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tercet.losses import TripletLoss

D, K, MARGIN = 128, 40, 0.2  # FaceNet: 128 dimensions, about 40 faces of an identity, margin on squared distance
OURS = "tercet"
Value = Callable[[Tensor, Tensor], Tensor]  # embeddings (N, D), not normalized; labels (N,)


def _ours(mining: str, fallback: bool, divide_by: str) -> Value:
    return TripletLoss(MARGIN, mining, fallback, divide_by=divide_by)


def _metric_learning() -> Value:
    from pytorch_metric_learning import distances, losses, miners

    distance = distances.LpDistance(power=2)
    miner = miners.TripletMarginMiner(MARGIN, "semihard", distance=distance)
    loss = losses.TripletMarginLoss(MARGIN, distance=distance)
    return lambda x, label: loss(x, label, miner(x, label))


def _sentence_transformers() -> Value:
    from sentence_transformers import losses

    metric = losses.BatchHardTripletLossDistanceFunction.euclidean_distance
    loss = losses.BatchSemiHardTripletLoss(torch.nn.Identity(), lambda x: metric(x, squared=True), MARGIN)
    return lambda x, label: loss.batch_semi_hard_triplet_loss(label, normalize(x, dim=-1))


@dataclass(frozen=True)
class Duel:
    """One loss: its name, the library that we are held against, and both ways to compute it."""

    loss: str
    peer: str
    makers: dict[str, Callable[[], Value]]

    def present(self) -> list[str]:
        """Ours, and the peer if it can be imported."""
        return [name for name in self.makers if name == OURS or find_spec(name.replace("-", "_"))]


DUELS = [
    Duel(
        "all semi-hard, over active",
        "pytorch-metric-learning",
        {OURS: lambda: _ours("all_semihard", False, "active"), "pytorch-metric-learning": _metric_learning},
    ),
    Duel(
        "closest semi-hard or farthest, over pairs",
        "sentence-transformers",
        {OURS: lambda: _ours("semihard", True, "pairs"), "sentence-transformers": _sentence_transformers},
    ),
]


def rows(n: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Embeddings ``(n, D)`` around a centre for every ``K`` of them, and their labels."""
    g = torch.Generator().manual_seed(0)
    label = torch.arange(n) // K
    x = 0.6 * torch.randn(len(label.unique()), D, generator=g)[label] + torch.randn(n, D, generator=g)
    return x.to(dtype).requires_grad_(), label


def step(value: Value, x: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Forward and backward: the loss and its gradient."""
    loss = value(x, label)
    return loss.detach(), torch.autograd.grad(loss, x)[0]
