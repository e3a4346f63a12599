"""Cutoff: parts of the embedded text are set to zero (Shen et al. 2020, arXiv:2009.13818; ConSERT, arXiv:2105.11741).

The word vectors are what is cut; the vector of a token's position stays, as does its place in the attention.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tercet.chance import mixed, uniform
from tercet.contract import ERASE_SCALE, Ragged
from tercet.error import InputError
from tercet.view.view import Pieces, check_rate, largest, layout


def _cut(inputs: Ragged, gone: Tensor) -> Ragged:
    before = inputs.more.get("keep", torch.ones_like(gone))
    return replace(inputs, more={**inputs.more, "keep": before & ~gone})


@dataclass(frozen=True)
class TokenCutoff:
    """Each token with probability ``rate``; never all of a row, never special ones."""

    rate: float

    def __post_init__(self) -> None:
        check_rate("TokenCutoff", self.rate)

    def __call__(self, inputs: Ragged, seed: Tensor, pieces: Pieces) -> Ragged:
        """The same tokens, some without their vector."""
        where = layout(inputs, pieces)
        draw = uniform(seed[where.row], where.place)
        spared = largest(draw, where.content, where.row, len(inputs))
        return _cut(inputs, where.content & (draw < self.rate) & ~spared)


@dataclass(frozen=True)
class SpanCutoff:
    """A share ``rate`` of a row's tokens that stand side by side; never all, never special ones."""

    rate: float

    def __post_init__(self) -> None:
        check_rate("SpanCutoff", self.rate)

    def __call__(self, inputs: Ragged, seed: Tensor, pieces: Pieces) -> Ragged:
        """The same tokens, a span of them without their vectors."""
        where = layout(inputs, pieces)
        size = where.size
        span = torch.minimum((self.rate * size).round().long(), (size - 1).clamp_min(0))
        start = (uniform(seed, 0) * (size - span + 1)).long()
        number = where.content.long().cumsum(0) - 1 - (size.cumsum(0) - size)[where.row]
        inside = (number >= start[where.row]) & (number < (start + span)[where.row])
        return _cut(inputs, where.content & inside)


@dataclass(frozen=True)
class FeatureCutoff:
    """Each column of the word vectors with probability ``rate``, the same ones for all tokens of a row."""

    rate: float

    def __post_init__(self) -> None:
        check_rate("FeatureCutoff", self.rate)

    def __call__(self, inputs: Ragged, seed: Tensor, pieces: Pieces) -> Ragged:
        """The same tokens; which columns go is drawn from what travels with them, once their number is known."""
        if "erase" in inputs.more:
            raise InputError("view: a look takes one FeatureCutoff. Give it the larger rate of the two.")
        row = layout(inputs, pieces).row
        marks = torch.stack([mixed(seed, 0), torch.full_like(seed, round(self.rate * ERASE_SCALE))], 1)
        return replace(inputs, more={**inputs.more, "erase": marks[row]})
