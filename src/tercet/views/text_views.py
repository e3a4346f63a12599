"""Two views of one text: chains of edits drawn from (seed, step, row)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from tercet.errors import InputError
from tercet.rng import derive_seed, uniform
from tercet.types import RATE_SCALE, TokenBatch


class TokenInfo(NamedTuple):
    """What is known of a tokenizer's V pieces: ``begins (V,)`` a word, is ``special (V,)``; ``limit`` tokens fit in a row."""

    word_start: Tensor
    special: Tensor
    mask_id: int | None
    max_length: int


class View(Protocol):
    """``(N rows, seed (N,), pieces) -> N rows``: what it draws depends on a row's seed and the place in the row alone."""

    def __call__(self, inputs: TokenBatch, seed: Tensor, pieces: TokenInfo) -> TokenBatch:
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
    def identical(self) -> bool:
        """Whether both looks are the text as it is."""
        return not self.first and not self.second

    def __call__(self, inputs: TokenBatch, uid: Tensor, step: int, pieces: TokenInfo) -> tuple[TokenBatch, TokenBatch]:
        """Both looks at N rows whose examples are ``uid (N,)``."""
        seed = derive_seed(derive_seed(torch.full_like(uid, self.seed), step), uid)
        looks = []
        for side, chain in enumerate((self.first, self.second)):
            look = inputs
            for place, view in enumerate(chain):
                look = view(look, derive_seed(derive_seed(seed, side), place), pieces)
            looks.append(look)
        return looks[0], looks[1]


class TokenLayout(NamedTuple):
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


def token_layout(inputs: TokenBatch, pieces: TokenInfo) -> TokenLayout:
    """Of all rows at once."""
    ids = inputs.ids
    length = inputs.lengths.to(ids.device)
    row = torch.repeat_interleave(torch.arange(len(length), device=ids.device), length)
    place = torch.arange(len(ids), device=ids.device) - (length.cumsum(0) - length)[row]
    content = ~pieces.special.to(ids.device)[ids]
    first = content & (_per_row_before(content, row, len(length)) == 0)
    begins = (pieces.word_start.to(ids.device)[ids] & content) | first  # RoBERTa marks no beginning there
    words = _per_row(begins, row, len(length))
    word = begins.cumsum(0) - (words.cumsum(0) - words)[row] - 1
    return TokenLayout(row, place, content, word.clamp_min(0), _per_row(content, row, len(length)), words)


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


def repeat_tokens(inputs: TokenBatch, repeats: Tensor, row: Tensor) -> TokenBatch:
    """Each token as often as ``repeats (T,)`` says, 0 or more; what travels with it too."""
    count = torch.zeros(len(inputs), dtype=torch.long, device=row.device).index_add(0, row, repeats.long())
    return TokenBatch(
        inputs.ids.repeat_interleave(repeats), count.cpu(), inputs.state.map(lambda x: x.repeat_interleave(repeats, 0))
    )


def is_row_maximum(value: Tensor, chosen: Tensor, row: Tensor, rows: int) -> Tensor:
    """``(T,)`` whether a token has the largest value of the chosen ones in its row."""
    top = torch.full((rows,), -1.0, device=value.device).scatter_reduce(0, row[chosen], value[chosen], "amax")
    return chosen & (value == top[row])


def check_rate(name: str, rate: float) -> None:
    """Raise ``InputError`` for what is no share."""
    if not 0 <= rate < 1:
        raise InputError(f"view {name} with rate={rate}: a rate from 0 to below 1; a rate of 1 would leave nothing.")


@dataclass(frozen=True)
class Deletion:
    """Each word with probability ``rate``; never all of a row. Word deletion of SimCSE's Table 1 (arXiv:2104.08821)."""

    rate: float

    def __post_init__(self) -> None:
        check_rate("Deletion", self.rate)

    def __call__(self, inputs: TokenBatch, seed: Tensor, pieces: TokenInfo) -> TokenBatch:
        """The rows without those words."""
        where = token_layout(inputs, pieces)
        draw = uniform(seed[where.row], where.word)
        kept = (draw >= self.rate) | is_row_maximum(draw, where.content, where.row, len(inputs)) | ~where.content
        return repeat_tokens(inputs, kept.long(), where.row)


@dataclass(frozen=True)
class Crop:
    """A share ``1 - rate`` of a row's words that stand side by side, one at least. SimCSE's Table 1 (arXiv:2104.08821)."""

    rate: float

    def __post_init__(self) -> None:
        check_rate("Crop", self.rate)

    def __call__(self, inputs: TokenBatch, seed: Tensor, pieces: TokenInfo) -> TokenBatch:
        """What is left of the rows, special tokens included."""
        where = token_layout(inputs, pieces)
        left = ((1 - self.rate) * where.words).round().long().clamp_min(1)
        start = (uniform(seed, 0) * (where.words - left + 1).clamp_min(1)).long()
        inside = (where.word >= start[where.row]) & (where.word < (start + left)[where.row])
        return repeat_tokens(inputs, (inside | ~where.content).long(), where.row)


@dataclass(frozen=True)
class Repetition:
    """Some pieces twice: up to a share ``rate`` of a row, or 2 (ESimCSE, Wu et al. 2021, arXiv:2109.04380, section 3.1)."""

    rate: float

    def __post_init__(self) -> None:
        check_rate("Repetition", self.rate)

    def __call__(self, inputs: TokenBatch, seed: Tensor, pieces: TokenInfo) -> TokenBatch:
        """Longer rows, never longer than the backbone takes."""
        where = token_layout(inputs, pieces)
        most = (self.rate * where.size).long().clamp_min(2)
        count = (uniform(seed, 0) * (most + 1)).long()
        room = (pieces.max_length - inputs.lengths.to(count.device)).clamp_min(0)
        count = torch.minimum(torch.minimum(count, room), where.size)
        draw = uniform(seed[where.row], where.place + 1).masked_fill(~where.content, 2.0)  # special ones come last
        order = order_in_row(draw, where.row)
        twice = torch.zeros_like(where.row)
        twice[order] = (where.place < count[where.row]).long()
        return repeat_tokens(inputs, 1 + twice, where.row)


@dataclass(frozen=True)
class Masking:
    """Each piece becomes the mask token with probability ``rate``."""

    rate: float

    def __post_init__(self) -> None:
        check_rate("Masking", self.rate)

    def __call__(self, inputs: TokenBatch, seed: Tensor, pieces: TokenInfo) -> TokenBatch:
        """As many tokens as before."""
        if pieces.mask_id is None:
            raise InputError("view=masking: the tokenizer has no mask token. Use view=token_cutoff.")
        where = token_layout(inputs, pieces)
        chosen = where.content & (uniform(seed[where.row], where.place) < self.rate)
        return replace(inputs, ids=inputs.ids.masked_fill(chosen, pieces.mask_id))


@dataclass(frozen=True)
class Shuffle:
    """The row's tokens exchange their positions; special ones keep theirs (ConSERT's token shuffling, arXiv:2105.11741)."""

    def __call__(self, inputs: TokenBatch, seed: Tensor, pieces: TokenInfo) -> TokenBatch:
        """The same tokens at other places."""
        where = token_layout(inputs, pieces)
        before = where.place if inputs.state.position is None else inputs.state.position
        which = where.content.nonzero()[:, 0]
        order = which[order_in_row(uniform(seed[where.row[which]], where.place[which]), where.row[which])]
        place = before.clone()
        place[order] = before[which]
        return replace(inputs, state=replace(inputs.state, position=place))


def _cut(inputs: TokenBatch, gone: Tensor) -> TokenBatch:
    before = torch.ones_like(gone) if inputs.state.keep is None else inputs.state.keep
    return replace(inputs, state=replace(inputs.state, keep=before & ~gone))


@dataclass(frozen=True)
class TokenCutoff:
    """Each token with probability ``rate``; never all of a row, never special ones."""

    rate: float

    def __post_init__(self) -> None:
        check_rate("TokenCutoff", self.rate)

    def __call__(self, inputs: TokenBatch, seed: Tensor, pieces: TokenInfo) -> TokenBatch:
        """The same tokens, some without their vector."""
        where = token_layout(inputs, pieces)
        draw = uniform(seed[where.row], where.place)
        spared = is_row_maximum(draw, where.content, where.row, len(inputs))
        return _cut(inputs, where.content & (draw < self.rate) & ~spared)


@dataclass(frozen=True)
class SpanCutoff:
    """A share ``rate`` of a row's tokens that stand side by side; never all, never special ones."""

    rate: float

    def __post_init__(self) -> None:
        check_rate("SpanCutoff", self.rate)

    def __call__(self, inputs: TokenBatch, seed: Tensor, pieces: TokenInfo) -> TokenBatch:
        """The same tokens, a span of them without their vectors."""
        where = token_layout(inputs, pieces)
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

    def __call__(self, inputs: TokenBatch, seed: Tensor, pieces: TokenInfo) -> TokenBatch:
        """The same tokens; which columns go is drawn from what travels with them, once their number is known."""
        if inputs.state.feature_cutoff is not None:
            raise InputError("view: a look takes one FeatureCutoff. Give it the larger rate of the two.")
        row = token_layout(inputs, pieces).row
        marks = torch.stack([derive_seed(seed, 0), torch.full_like(seed, round(self.rate * RATE_SCALE))], 1)
        return replace(inputs, state=replace(inputs.state, feature_cutoff=marks[row]))
