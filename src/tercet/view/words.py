"""Changes of the text itself: words left out or repeated, pieces masked, places exchanged."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tercet.chance import uniform
from tercet.contract import Ragged
from tercet.error import InputError
from tercet.view.view import Pieces, check_rate, largest, layout, order_in_row, select


@dataclass(frozen=True)
class Deletion:
    """Each word with probability ``rate``; never all of a row. Word deletion of SimCSE's Table 1 (arXiv:2104.08821)."""

    rate: float

    def __post_init__(self) -> None:
        check_rate("Deletion", self.rate)

    def __call__(self, inputs: Ragged, seed: Tensor, pieces: Pieces) -> Ragged:
        """The rows without those words."""
        where = layout(inputs, pieces)
        draw = uniform(seed[where.row], where.word)
        kept = (draw >= self.rate) | largest(draw, where.content, where.row, len(inputs)) | ~where.content
        return select(inputs, kept.long(), where.row)


@dataclass(frozen=True)
class Crop:
    """A share ``1 - rate`` of a row's words that stand side by side, one at least. SimCSE's Table 1 (arXiv:2104.08821)."""

    rate: float

    def __post_init__(self) -> None:
        check_rate("Crop", self.rate)

    def __call__(self, inputs: Ragged, seed: Tensor, pieces: Pieces) -> Ragged:
        """What is left of the rows, special tokens included."""
        where = layout(inputs, pieces)
        left = ((1 - self.rate) * where.words).round().long().clamp_min(1)
        start = (uniform(seed, 0) * (where.words - left + 1).clamp_min(1)).long()
        inside = (where.word >= start[where.row]) & (where.word < (start + left)[where.row])
        return select(inputs, (inside | ~where.content).long(), where.row)


@dataclass(frozen=True)
class Repetition:
    """Some pieces twice: up to a share ``rate`` of a row, or 2 (ESimCSE, Wu et al. 2021, arXiv:2109.04380, section 3.1)."""

    rate: float

    def __post_init__(self) -> None:
        check_rate("Repetition", self.rate)

    def __call__(self, inputs: Ragged, seed: Tensor, pieces: Pieces) -> Ragged:
        """Longer rows, never longer than the backbone takes."""
        where = layout(inputs, pieces)
        most = (self.rate * where.size).long().clamp_min(2)
        count = (uniform(seed, 0) * (most + 1)).long()
        room = (pieces.limit - inputs.length.to(count.device)).clamp_min(0)
        count = torch.minimum(torch.minimum(count, room), where.size)
        draw = uniform(seed[where.row], where.place + 1).masked_fill(~where.content, 2.0)  # special ones come last
        order = order_in_row(draw, where.row)
        twice = torch.zeros_like(where.row)
        twice[order] = (where.place < count[where.row]).long()
        return select(inputs, 1 + twice, where.row)


@dataclass(frozen=True)
class Masking:
    """Each piece becomes the mask token with probability ``rate``."""

    rate: float

    def __post_init__(self) -> None:
        check_rate("Masking", self.rate)

    def __call__(self, inputs: Ragged, seed: Tensor, pieces: Pieces) -> Ragged:
        """As many tokens as before."""
        if pieces.mask_id is None:
            raise InputError("view=masking: the tokenizer has no mask token. Use view=token_cutoff.")
        where = layout(inputs, pieces)
        chosen = where.content & (uniform(seed[where.row], where.place) < self.rate)
        return replace(inputs, ids=inputs.ids.masked_fill(chosen, pieces.mask_id))


@dataclass(frozen=True)
class Shuffle:
    """The row's tokens exchange their positions; special ones keep theirs (ConSERT's token shuffling, arXiv:2105.11741)."""

    def __call__(self, inputs: Ragged, seed: Tensor, pieces: Pieces) -> Ragged:
        """The same tokens at other places."""
        where = layout(inputs, pieces)
        before = inputs.more.get("place", where.place)
        which = where.content.nonzero()[:, 0]
        order = which[order_in_row(uniform(seed[where.row[which]], where.place[which]), where.row[which])]
        place = before.clone()
        place[order] = before[which]
        return replace(inputs, more={**inputs.more, "place": place})
