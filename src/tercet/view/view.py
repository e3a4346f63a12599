"""Two looks at one text: chains of changes, drawn from (seed, step, row)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from tercet.chance import mixed
from tercet.contract import Ragged
from tercet.error import InputError


class Pieces(NamedTuple):
    """What is known of a tokenizer's V pieces: ``begins (V,)`` a word, is ``special (V,)``; ``limit`` tokens fit in a row."""

    begins: Tensor
    special: Tensor
    mask_id: int | None
    limit: int


class View(Protocol):
    """``(N rows, seed (N,), pieces) -> N rows``: what it draws depends on a row's seed and the place in the row alone."""

    def __call__(self, inputs: Ragged, seed: Tensor, pieces: Pieces) -> Ragged:
        """What is left of each row: special tokens, and one token besides at least."""
        ...


@dataclass(frozen=True)
class Views:
    """What is done to the ``first`` look and to the ``second``, each in order; dropout comes on top in the encoder.

    Draws are a function of (``seed``, step, row): the same for any number of processes and any chunks.
    """

    first: Sequence[View]
    second: Sequence[View]
    seed: int

    @property
    def alike(self) -> bool:
        """Whether both looks are the text as it is."""
        return not self.first and not self.second

    def __call__(self, inputs: Ragged, uid: Tensor, step: int, pieces: Pieces) -> tuple[Ragged, Ragged]:
        """Both looks at N rows whose examples are ``uid (N,)``."""
        seed = mixed(mixed(torch.full_like(uid, self.seed), step), uid)
        looks = []
        for side, chain in enumerate((self.first, self.second)):
            look = inputs
            for place, view in enumerate(chain):
                look = view(look, mixed(mixed(seed, side), place), pieces)
            looks.append(look)
        return looks[0], looks[1]


class Layout(NamedTuple):
    """Where T tokens of N rows stand.

    ``row (T,)``; ``place (T,)`` in the row; ``content (T,)``, not special; ``word (T,)``, the number of the token's word
    in its row, from 0; ``size (N,)`` content tokens and ``words (N,)`` words of each row.
    """

    row: Tensor
    place: Tensor
    content: Tensor
    word: Tensor
    size: Tensor
    words: Tensor


def layout(inputs: Ragged, pieces: Pieces) -> Layout:
    """Of all rows at once."""
    ids = inputs.ids
    length = inputs.length.to(ids.device)
    row = torch.repeat_interleave(torch.arange(len(length), device=ids.device), length)
    place = torch.arange(len(ids), device=ids.device) - (length.cumsum(0) - length)[row]
    content = ~pieces.special.to(ids.device)[ids]
    first = content & (_per_row_before(content, row, len(length)) == 0)
    begins = (pieces.begins.to(ids.device)[ids] & content) | first  # RoBERTa marks no beginning there
    words = _per_row(begins, row, len(length))
    word = begins.cumsum(0) - (words.cumsum(0) - words)[row] - 1
    return Layout(row, place, content, word.clamp_min(0), _per_row(content, row, len(length)), words)


def _per_row_before(flag: Tensor, row: Tensor, rows: int) -> Tensor:
    """``(T,)`` how many tokens of the same row before this one have the flag."""
    count = _per_row(flag, row, rows)
    return flag.long().cumsum(0) - flag.long() - (count.cumsum(0) - count)[row]


def _per_row(flag: Tensor, row: Tensor, rows: int) -> Tensor:
    return torch.zeros(rows, dtype=torch.long, device=row.device).index_add(0, row, flag.long())


def order_in_row(value: Tensor, row: Tensor) -> Tensor:
    """``(T,)`` tokens' indices, by row and then by ``value``."""
    by_value = value.argsort(stable=True)
    return by_value[row[by_value].argsort(stable=True)]


def select(inputs: Ragged, repeats: Tensor, row: Tensor) -> Ragged:
    """Each token as often as ``repeats (T,)`` says, 0 or more; what travels with it too."""
    count = torch.zeros(len(inputs), dtype=torch.long, device=row.device).index_add(0, row, repeats.long())
    more = {name: value.repeat_interleave(repeats, 0) for name, value in inputs.more.items()}
    return Ragged(inputs.ids.repeat_interleave(repeats), count.cpu(), more)


def largest(value: Tensor, chosen: Tensor, row: Tensor, rows: int) -> Tensor:
    """``(T,)`` whether a token has the largest value of the chosen ones in its row."""
    top = torch.full((rows,), -1.0, device=value.device).scatter_reduce(0, row[chosen], value[chosen], "amax")
    return chosen & (value == top[row])


def check_rate(name: str, rate: float) -> None:
    """Raise ``InputError`` for what is no share."""
    if not 0 <= rate < 1:
        raise InputError(f"view {name} with rate={rate}: a rate from 0 to below 1; a rate of 1 would leave nothing.")
