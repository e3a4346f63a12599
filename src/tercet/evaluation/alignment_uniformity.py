"""Alignment and uniformity (Wang and Isola 2020, arXiv:2005.10242)."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tercet.errors import InputError
from tercet.evaluation.inputs import check_source, distinct, text_pairs
from tercet.types import EncodeFunction, Source


def alignment(x: Tensor, y: Tensor) -> float:
    """E ||x - y||^2 over positive pairs on the unit sphere (eq. 1 with alpha 2): ``(N, D), (N, D)``; smaller is closer."""
    x, y = F.normalize(x.double(), dim=-1), F.normalize(y.double(), dim=-1)
    return float((x - y).square().sum(1).mean())


def uniformity(x: Tensor, block: int = 512) -> float:
    """Log E exp(-2 ||x - y||^2) over distinct pairs of rows (eq. 2 with t 2): ``(N, D)``; smaller is more spread.

    A row is no pair with itself. In blocks: ``block`` x N numbers at a time.
    """
    x = F.normalize(x.double(), dim=-1)
    square = x.square().sum(1)  # 1, and 0 for a zero row: collapse to zero must not look spread
    parts = []
    for start in range(0, len(x), block):
        rows, rest = slice(start, start + block), slice(start, None)  # each pair once: row before column
        exponents = 4 * (x[rows] @ x[rest].T) - 2 * square[rows, None] - 2 * square[rest]
        exponents.masked_fill_(torch.ones_like(exponents, dtype=torch.bool).tril(), -math.inf)
        parts.append(exponents.logsumexp((0, 1)))
    return float(torch.stack(parts).logsumexp(0)) - math.log(len(x) * (len(x) - 1) / 2)


@dataclass(frozen=True)
class AlignmentUniformity:
    """``alignment_uniformity/<name>/alignment`` of a source's pairs and ``/uniformity`` of its distinct texts.

    The pairs are its first two columns; of a source of one column the halves of its texts, as for ``Retrieval``.
    """

    name: str
    source: Source

    def __post_init__(self) -> None:
        check_source("alignment_uniformity", self.name, self.source)

    def __call__(self, encode: EncodeFunction) -> dict[str, float]:
        """Both, from one call of ``encode`` with each distinct text once."""
        first, second, _ = text_pairs(self.source, f"alignment_uniformity of {self.name}")
        texts, place = distinct([*first, *second])
        if len(texts) < 2:
            raise InputError(f"alignment_uniformity of {self.name}: all held-out texts are equal. Set data.held_out higher.")
        z = encode(texts)
        return {
            f"alignment_uniformity/{self.name}/alignment": alignment(z[place[: len(first)]], z[place[len(first) :]]),
            f"alignment_uniformity/{self.name}/uniformity": uniformity(z),
        }
