"""Alignment and uniformity (Wang and Isola 2020, arXiv:2005.10242)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tercet.errors import require
from tercet.evaluation.inputs import Rows, check_source, distinct, embed_columns, encode_once, has_one_prompt, text_pairs
from tercet.types import EncodeFunction


def alignment(x: Tensor, y: Tensor) -> float:
    """E ||x - y||^2 over positive pairs on the unit sphere (eq. 1 with alpha 2), of ``(N, D), (N, D)``; smaller is closer.

    >>> alignment(torch.eye(2), -torch.eye(2))
    4.0
    """
    return float(_squared_distances(x, y).mean())


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    x, y = (F.normalize(torch.as_tensor(z).double(), dim=-1) for z in (x, y))
    return (x - y).square().sum(1)


def uniformity(x: Tensor, block: int = 512) -> float:
    """Log E exp(-2 ||x - y||^2) over distinct pairs of rows (eq. 2 with t 2), of ``(N, D)``; smaller is more spread.

    >>> round(uniformity(torch.eye(3)), 6)  # orthogonal vectors: squared distance 2
    -4.0
    """
    x = F.normalize(torch.as_tensor(x).double(), dim=-1)
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

    >>> source = {"question": ["ab", "cd"], "answer": ["aab", "dd"]}
    >>> encode = lambda texts: torch.tensor([[text.count(letter) for letter in "abcd"] for text in texts])
    >>> {name: round(value, 3) for name, value in AlignmentUniformity(source)(encode).items()}
    {'alignment_uniformity/pairs/alignment': 0.344, 'alignment_uniformity/pairs/uniformity': -1.611}
    """

    source: Rows
    name: str = "pairs"
    smaller_is_better: ClassVar[frozenset[str]] = frozenset({"alignment", "uniformity"})

    def __post_init__(self) -> None:
        check_source("alignment_uniformity", self.name, self.source)

    def __call__(self, encode: EncodeFunction) -> dict[str, float]:
        """Measure; a model with a prompt for each column uses them, and a text of both columns is two inputs then."""
        x, y, inputs = self._embed(encode)
        metrics = {"alignment": alignment(x, y), "uniformity": uniformity(inputs)}
        return {f"alignment_uniformity/{self.name}/{metric}": value for metric, value in metrics.items()}

    def examples(self, encode: EncodeFunction) -> dict[str, Tensor]:
        """The squared distance of each pair, ``(N,)``, whose mean is alignment; uniformity is no mean over examples."""
        x, y, _ = self._embed(encode)
        return {f"alignment_uniformity/{self.name}/alignment": _squared_distances(x, y)}

    def _embed(self, encode: EncodeFunction) -> tuple[Tensor, Tensor, Tensor]:
        """The two sides of the pairs, ``(N, D)`` each, and the distinct inputs."""
        suite = f"alignment_uniformity of {self.name}"
        first, second, _ = text_pairs(self.source, suite)
        if has_one_prompt(encode):
            embed = encode_once(encode, [*first, *second])
            x, y, inputs = embed(first), embed(second), embed(distinct([*first, *second])[0])
        else:
            (queries, query_of), (documents, document_of) = distinct(first), distinct(second)
            x, y = embed_columns(encode, queries, documents)
            x, y, inputs = x[query_of], y[document_of], torch.cat([x, y])
        require(len(inputs) > 1, f"{suite}: all held-out texts are equal. Set `source.held_out` higher.")
        return x, y, inputs
