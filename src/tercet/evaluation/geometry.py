"""Alignment and uniformity (Wang and Isola 2020, arXiv:2005.10242)."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tercet.contract import Encode, Source
from tercet.evaluation.pairs import text_pairs


def alignment(x: Tensor, y: Tensor) -> float:
    """E ||x - y||^2 over positive pairs on the unit sphere (eq. 1 with alpha 2): ``(N, D), (N, D)``; smaller is closer."""
    x, y = F.normalize(x.double(), dim=-1), F.normalize(y.double(), dim=-1)
    return float((x - y).square().sum(1).mean())


def uniformity(x: Tensor, block: int = 2048) -> float:
    """Log E exp(-2 ||x - y||^2) over distinct pairs of rows (eq. 2 with t 2): ``(N, D)``; smaller is more spread.

    A row is no pair with itself. In blocks: N x ``block`` numbers at a time.
    """
    x = F.normalize(x.double(), dim=-1)
    parts = []
    for start in range(0, len(x), block):
        exponents = 4 * (x[start : start + block] @ x.T - 1)
        exponents.diagonal(start).fill_(-math.inf)
        parts.append(exponents.logsumexp((0, 1)))
    return float(torch.stack(parts).logsumexp(0)) - math.log(len(x) * (len(x) - 1))


@dataclass(frozen=True)
class Geometry:
    """``geometry/<name>/alignment`` of a source's pairs and ``/uniformity`` of its distinct texts."""

    name: str
    source: Source

    def __call__(self, encode: Encode) -> dict[str, float]:
        """Both, in one call of ``encode``."""
        first, second, _ = text_pairs(self.source, f"geometry of {self.name}")
        texts = list(dict.fromkeys([*first, *second]))
        z = encode([*first, *second, *texts])
        x, y, unique = z.split([len(first), len(second), len(texts)])
        return {
            f"geometry/{self.name}/alignment": alignment(x, y),
            f"geometry/{self.name}/uniformity": uniformity(unique),
        }
