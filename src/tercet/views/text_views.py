"""Two views of one text: chains of edits whose random draws depend on (seed, step, row)."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from tercet.errors import InputError, check_choice, require
from tercet.rng import derive_seed, uniform
from tercet.types import RATE_SCALE, TokenBatch

__all__ = ["Crop", "Deletion", "FeatureCutoff", "Masking", "Repetition", "Shuffle", "SpanCutoff", "TokenCutoff",
           "TokenInfo", "View", "Views"]  # fmt: skip


class TokenInfo(NamedTuple):
    """What edits need to know about a vocabulary of V tokens.

    ``word_start (V,)`` is true for tokens that begin a word, ``special (V,)`` for special tokens; ``mask_id`` is the mask
    token, if there is one; a row has at most ``max_length`` tokens. Rephrasing needs the ``tokenizer``.

    >>> info = TokenInfo(word_start=torch.ones(16, dtype=torch.bool), special=torch.arange(16) < 2)
    >>> info.max_length
    512
    """

    word_start: Tensor
    special: Tensor
    mask_id: int | None = None
    max_length: int = 512
    tokenizer: Any = None


# The arguments of an edit in the examples below: one row of four words between two special tokens, a seed, a vocabulary of 16.
_VOCABULARY = TokenInfo(torch.arange(16) >= 0, torch.arange(16) < 2, mask_id=2)
EXAMPLE = (TokenBatch.from_lists([[0, 5, 6, 7, 8, 1]]), torch.tensor([7]), _VOCABULARY)


class View(Protocol):
    """An edit of N rows of tokens.

    ``view(inputs, seed (N,), info)`` keeps special tokens and at least one other token of each row. What it draws depends only
    on the row's seed and on positions in the row, so that a row gets the same edit in any batch.
    """

    def __call__(self, inputs: TokenBatch, seed: Tensor, info: TokenInfo) -> TokenBatch:
        """The edited rows."""


@dataclass(frozen=True)
class Views:
    """The edits that make the ``first`` and the ``second`` view of a text, each applied in order; the encoder adds dropout.

    Draws depend on (``seed``, step, example): they are the same for any number of processes and any chunks.

    >>> text, example_id, info = EXAMPLE
    >>> first, second = Views(second=[Crop(0.5)])(text, example_id, step=0, info=info)
    >>> first.ids.tolist(), second.ids.tolist()
    ([0, 5, 6, 7, 8, 1], [0, 5, 6, 1])
    """

    first: Sequence[View] = ()
    second: Sequence[View] = ()
    seed: int = 0

    @property
    def identical(self) -> bool:
        """Whether both views are the unchanged text."""
        return not self.first and not self.second

    @property
    def on_device(self) -> bool:
        """Whether an edit runs a model, which belongs on the device of the encoder."""
        return any(getattr(edit, "on_device", False) for edit in (*self.first, *self.second))

    def __call__(self, inputs: TokenBatch, example_id: Tensor, step: int, info: TokenInfo) -> tuple[TokenBatch, TokenBatch]:
        """Both views of N rows of the examples ``example_id (N,)``."""
        seed = derive_seed(derive_seed(torch.full_like(example_id, self.seed), step), example_id)
        views = [inputs, inputs]
        for which, edits in enumerate((self.first, self.second)):
            for number, edit in enumerate(edits):
                views[which] = edit(views[which], derive_seed(derive_seed(seed, which), number), info)
        return views[0], views[1]


class TokenLayout(NamedTuple):
    """Where the T tokens of N rows are."""

    row: Tensor  # (T,)
    offset: Tensor  # (T,), from the start of the row
    content: Tensor  # (T,), false for special tokens
    word: Tensor  # (T,), the number of the word in its row, from 0
    num_content: Tensor  # (N,)
    num_words: Tensor  # (N,)


def token_layout(inputs: TokenBatch, info: TokenInfo) -> TokenLayout:
    """Compute the layout of all rows at once."""
    ids, row, offset = inputs.ids, inputs.index.row, inputs.index.position
    content = ~info.special.to(ids.device)[ids]
    num_content = _count(content, row, len(inputs))
    before = content.cumsum(0) - content.long() - (num_content.cumsum(0) - num_content)[row]
    # The first content token of a row begins a word even where RoBERTa's vocabulary does not mark it.
    starts = content & (info.word_start.to(ids.device)[ids] | (before == 0))
    num_words = _count(starts, row, len(inputs))
    word = starts.cumsum(0) - (num_words.cumsum(0) - num_words)[row] - 1
    return TokenLayout(row, offset, content, word.clamp_min(0), num_content, num_words)


def _count(number: Tensor, row: Tensor, rows: int) -> Tensor:
    return torch.zeros(rows, dtype=torch.long, device=row.device).index_add(0, row, number.long())


def order_in_row(value: Tensor, row: Tensor) -> Tensor:
    """``(T,)`` indices that sort tokens by row and then by ``value``."""
    by_value = value.argsort(stable=True)
    return by_value[row[by_value].argsort(stable=True)]


def repeat_tokens(inputs: TokenBatch, repeats: Tensor, row: Tensor) -> TokenBatch:
    """Repeat each token ``repeats (T,)`` times, 0 or more, with its state."""
    state = inputs.state.map(lambda x: x.repeat_interleave(repeats, 0))
    return TokenBatch(inputs.ids.repeat_interleave(repeats), _count(repeats, row, len(inputs)).cpu(), state)


def is_row_maximum(value: Tensor, content: Tensor, row: Tensor, rows: int) -> Tensor:
    """``(T,)`` whether a token has the largest value of the content tokens of its row."""
    top = value.new_full((rows,), -1.0).scatter_reduce(0, row[content], value[content], "amax")
    return content & (value == top[row])


class RowView(ABC):
    """The base of edits by the layout of rows; ``rate``, where an edit has one, is a share from 0 to below 1.

    ``variant`` of a cutoff: ``input`` cuts word vectors, before positions and normalization, and tokens still attend to what
    is cut; ``shen`` cuts the output of the embedding layer, and no token attends to a token that is cut, as Shen et al. do
    (2020, arXiv:2009.13818, and their code): a fixed number of draws with replacement, from special tokens too.
    """

    def __post_init__(self) -> None:
        rate, accepted = getattr(self, "rate", 0), "a rate from 0 to below 1; a rate of 1 would leave nothing"
        require(0 <= rate < 1, f"{type(self).__name__} with `rate`={rate}: {accepted}.")
        check_choice("variant", getattr(self, "variant", "input"), ("input", "shen"))

    def __call__(self, inputs: TokenBatch, seed: Tensor, info: TokenInfo) -> TokenBatch:
        """The edited rows."""
        return self._edit(inputs, token_layout(inputs, info), seed, info)

    @abstractmethod
    def _edit(self, inputs: TokenBatch, at: TokenLayout, seed: Tensor, info: TokenInfo) -> TokenBatch:
        """The edited rows, of which ``at`` is the layout."""


@dataclass(frozen=True)
class Deletion(RowView):
    """Delete each word with probability ``rate``, but never all of a row (SimCSE, arXiv:2104.08821, Table 1).

    >>> Deletion(0.5)(*EXAMPLE).ids.tolist()
    [0, 7, 8, 1]
    """

    rate: float = 0.1

    def _edit(self, inputs: TokenBatch, at: TokenLayout, seed: Tensor, info: TokenInfo) -> TokenBatch:
        draw = uniform(seed[at.row], at.word)
        keep = (draw >= self.rate) | is_row_maximum(draw, at.content, at.row, len(inputs)) | ~at.content
        return repeat_tokens(inputs, keep.long(), at.row)


@dataclass(frozen=True)
class Crop(RowView):
    """Keep a share ``1 - rate`` of consecutive words of a row, at least one (SimCSE, arXiv:2104.08821, Table 1).

    >>> Crop(0.5)(*EXAMPLE).ids.tolist()
    [0, 6, 7, 1]
    """

    rate: float = 0.1

    def _edit(self, inputs: TokenBatch, at: TokenLayout, seed: Tensor, info: TokenInfo) -> TokenBatch:
        size = ((1 - self.rate) * at.num_words).round().long().clamp_min(1)
        start = (uniform(seed, 0) * (at.num_words - size + 1).clamp_min(1)).long()
        inside = (at.word >= start[at.row]) & (at.word < (start + size)[at.row])
        return repeat_tokens(inputs, (inside | ~at.content).long(), at.row)


@dataclass(frozen=True)
class Repetition(RowView):
    """Repeat random tokens: up to a share ``rate`` of a row, or 2 (ESimCSE, Wu et al. 2021, arXiv:2109.04380, section 3.1).

    Rows do not become longer than ``info.max_length``.

    >>> Repetition()(*EXAMPLE).ids.tolist()
    [0, 5, 6, 7, 8, 8, 1]
    """

    rate: float = 0.32

    def _edit(self, inputs: TokenBatch, at: TokenLayout, seed: Tensor, info: TokenInfo) -> TokenBatch:
        most = (self.rate * at.num_content).long().clamp_min(2)
        count = (uniform(seed, 0) * (most + 1)).long()
        room = (info.max_length - inputs.index.length).clamp_min(0)
        count = torch.minimum(torch.minimum(count, room), at.num_content)
        draw = uniform(seed[at.row], at.offset + 1).masked_fill(~at.content, 2.0)  # special tokens come last
        twice = torch.zeros_like(at.row)
        twice[order_in_row(draw, at.row)] = (at.offset < count[at.row]).long()
        return repeat_tokens(inputs, 1 + twice, at.row)


@dataclass(frozen=True)
class Masking(RowView):
    """Replace each token by the mask token with probability ``rate``.

    >>> Masking(0.5)(*EXAMPLE).ids.tolist()
    [0, 2, 6, 7, 2, 1]
    """

    rate: float = 0.15

    def _edit(self, inputs: TokenBatch, at: TokenLayout, seed: Tensor, info: TokenInfo) -> TokenBatch:
        if info.mask_id is None:
            raise InputError("Masking: the tokenizer has no mask token. Use TokenCutoff.")
        chosen = at.content & (uniform(seed[at.row], at.offset) < self.rate)
        return replace(inputs, ids=inputs.ids.masked_fill(chosen, info.mask_id))


@dataclass(frozen=True)
class Shuffle(RowView):
    """Exchange the positions of a row's content tokens at random (token shuffling of ConSERT, arXiv:2105.11741).

    >>> Shuffle()(*EXAMPLE).state.position.tolist()
    [0, 1, 4, 3, 2, 5]
    """

    def _edit(self, inputs: TokenBatch, at: TokenLayout, seed: Tensor, info: TokenInfo) -> TokenBatch:
        before = at.offset if inputs.state.position is None else inputs.state.position
        which = at.content.nonzero()[:, 0]
        order = which[order_in_row(uniform(seed[at.row[which]], at.offset[which]), at.row[which])]
        position = before.clone()
        position[order] = before[which]
        return replace(inputs, state=replace(inputs.state, position=position))


def _cut(inputs: TokenBatch, cut: Tensor, field: str = "keep") -> TokenBatch:
    return replace(inputs, state=replace(inputs.state, **{field: inputs.state_field(field) & ~cut}))


@dataclass(frozen=True)
class TokenCutoff(RowView):
    """Set the word vector of each token to zero with probability ``rate``, but never of all in a row (ConSERT).

    With ``variant="shen"`` it is the whole vector of ``int(rate * length)`` draws, to which no token attends.

    >>> TokenCutoff(0.5)(*EXAMPLE).state.keep.long().tolist()
    [1, 0, 1, 1, 0, 1]
    >>> TokenCutoff(0.5, variant="shen")(*EXAMPLE).state.attend.long().tolist()
    [0, 1, 0, 1, 1, 0]
    """

    rate: float = 0.15
    variant: str = "input"

    def _edit(self, inputs: TokenBatch, at: TokenLayout, seed: Tensor, info: TokenInfo) -> TokenBatch:
        if self.variant == "shen":
            length = inputs.index.length[:, None]
            number = torch.arange(int(self.rate * int(inputs.lengths.max())), device=at.row.device)
            index = (uniform(seed[:, None], number) * length).long() + (length.cumsum(0) - length)
            drawn = (number < (self.rate * length).long()).long()
            cut = torch.zeros_like(at.row).index_add(0, index.flatten().clamp(max=len(at.row) - 1), drawn.flatten()) > 0
            return _cut(inputs, cut, "attend")
        draw = uniform(seed[at.row], at.offset)
        return _cut(inputs, at.content & (draw < self.rate) & ~is_row_maximum(draw, at.content, at.row, len(inputs)))


@dataclass(frozen=True)
class SpanCutoff(RowView):
    """Set the word vectors of a share ``rate`` of consecutive tokens to zero, never of all (Shen et al., arXiv:2009.13818).

    With ``variant="shen"`` it is whole vectors, also of special tokens, to which no token attends.

    >>> SpanCutoff(0.5)(*EXAMPLE).state.keep.long().tolist()
    [1, 1, 0, 0, 1, 1]
    """

    rate: float = 0.15
    variant: str = "input"

    def _edit(self, inputs: TokenBatch, at: TokenLayout, seed: Tensor, info: TokenInfo) -> TokenBatch:
        if self.variant == "shen":
            length = inputs.index.length
            span = (self.rate * length).long()
            first = (uniform(seed, 0) * (length - span)).long()
            return _cut(inputs, (at.offset >= first[at.row]) & (at.offset < (first + span)[at.row]), "attend")
        size = at.num_content
        span = torch.minimum((self.rate * size).round().long(), (size - 1).clamp_min(0))
        start = (uniform(seed, 0) * (size - span + 1)).long()
        number = at.content.long().cumsum(0) - 1 - (size.cumsum(0) - size)[at.row]
        return _cut(inputs, at.content & (number >= start[at.row]) & (number < (start + span)[at.row]))


@dataclass(frozen=True)
class FeatureCutoff(RowView):
    """Set each column of the word vectors to zero with probability ``rate``, the same columns for all tokens of a row.

    The encoder, which knows their number, draws the columns from ``state.feature_cutoff``: a seed and the rate (ConSERT,
    arXiv:2105.11741, section 3.2). With ``variant="shen"`` it is ``int(rate * H)`` draws of columns of the embedding layer's
    output.

    >>> FeatureCutoff(0.5)(*EXAMPLE).state.feature_cutoff.shape
    torch.Size([6, 2])
    """

    rate: float = 0.15
    variant: str = "input"

    def _edit(self, inputs: TokenBatch, at: TokenLayout, seed: Tensor, info: TokenInfo) -> TokenBatch:
        field = "embedding_cutoff" if self.variant == "shen" else "feature_cutoff"
        message = "A view takes one FeatureCutoff. Give it the larger `rate` of the two."
        require(getattr(inputs.state, field) is None, message)
        rate = (math.ceil if self.variant == "shen" else round)(self.rate * RATE_SCALE)  # int(rate * H) is then as in floats
        marks = torch.stack([derive_seed(seed, 0), torch.full_like(seed, rate)], 1)
        return replace(inputs, state=replace(inputs.state, **{field: marks[at.row]}))
