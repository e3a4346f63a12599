"""The words everybody speaks.

Shapes: V views, N examples, T tokens, L tokens of the longest row, H hidden, D embedding, W processes; images have
C channels and S x S pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

ERASE_SCALE = 1 << 24


@dataclass  # not frozen, as Batch: Lightning rebuilds batches field by field in true half precision
class Ragged:
    """N rows of token ids, one after the other and without padding: ``ids (T,)`` and ``length (N,)``.

    ``length`` stays on the CPU: the encoder plans its chunks from it, and a device would have to be waited for.
    ``more`` is what else is known of the tokens: ``keep (T,)``, false where the token's vector is zero; ``place (T,)``,
    its position; ``erase (T, 2)``, a seed and a share (in ``ERASE_SCALE``) of columns that are zero in the row; ``noise
    (T,)``, a seed of its dropout.
    """

    ids: Tensor
    length: Tensor
    more: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.length)

    def to(self, device: torch.device | str) -> "Ragged":
        """The same rows with their ids on ``device``."""
        more = {name: value.to(device, non_blocking=True) for name, value in self.more.items()}
        return Ragged(self.ids.to(device, non_blocking=True), self.length, more)

    def rows(self) -> tuple[Tensor, ...]:
        """The N rows, each ``(length,)``."""
        return torch.split(self.ids, self.length.tolist())

    def take(self, which: Tensor) -> "Ragged":
        """The chosen rows, in that order."""
        length = self.length[which]
        start = (self.length.cumsum(0) - self.length)[which] - (length.cumsum(0) - length)
        where = torch.arange(int(length.sum())) + torch.repeat_interleave(start, length)
        where = where.to(self.ids.device, non_blocking=True)
        return Ragged(self.ids[where], length, {name: value[where] for name, value in self.more.items()})

    def padded(self, fill: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """``ids (N, L)`` and ``mask (N, L)``, padded on the right to the longest; ``more (N, L, ...)`` with zeros."""
        more = {name: spread(value, self.length) for name, value in self.more.items()}
        mask = spread(torch.ones_like(self.ids), self.length)
        return spread(self.ids, self.length, fill), mask, more

    @staticmethod
    def cat(parts: "Sequence[Ragged]") -> "Ragged":
        """All rows of all parts, in order."""
        names = dict.fromkeys(name for p in parts for name in p.more)
        more = {name: torch.cat([p.more.get(name, p.unchanged(name)) for p in parts]) for name in names}
        return Ragged(torch.cat([p.ids for p in parts]), torch.cat([p.length for p in parts]), more)

    def unchanged(self, name: str) -> Tensor:
        """What a member of ``more`` is where no view has changed it."""
        if name == "keep":
            return torch.ones_like(self.ids, dtype=torch.bool)
        if name == "erase":
            return self.ids.new_zeros(len(self.ids), 2)
        start = torch.repeat_interleave(self.length.cumsum(0) - self.length, self.length)
        return torch.arange(len(self.ids), device=self.ids.device) - start.to(self.ids.device)

    @staticmethod
    def of(rows: Sequence[Sequence[int]]) -> "Ragged":
        """From lists of token ids."""
        flat = [token for row in rows for token in row]
        return Ragged(torch.tensor(flat, dtype=torch.long), torch.tensor([len(row) for row in rows], dtype=torch.long))


def spread(flat: Tensor, length: Tensor, fill: int = 0) -> Tensor:
    """``(T, ...)`` to ``(N, L, ...)``: ``fill`` where a row has ended."""
    out = flat.new_full((len(length) * int(length.max()), *flat.shape[1:]), fill)
    return out.index_copy(0, _places(length, flat.device), flat).view(len(length), -1, *flat.shape[1:])


def gathered(padded: Tensor, length: Tensor) -> Tensor:
    """The inverse: ``(N, L, ...)`` to ``(T, ...)``."""
    return padded.flatten(0, 1)[_places(length, padded.device)]


def _places(length: Tensor, device: torch.device) -> Tensor:
    row = torch.repeat_interleave(torch.arange(len(length)), length)
    place = torch.arange(len(row)) - (length.cumsum(0) - length)[row]
    return (row * int(length.max()) + place).to(device, non_blocking=True)


@dataclass
class Images:
    """N images as the files have them: ``pixels (N, C, S, S)``, 8 bits each; the encoder scales them on its device."""

    pixels: Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    def to(self, device: torch.device | str) -> "Images":
        """The same images on ``device``."""
        return Images(self.pixels.to(device, non_blocking=True))

    @staticmethod
    def cat(parts: "Sequence[Images]") -> "Images":
        """All images of all parts, in order."""
        return Images(torch.cat([p.pixels for p in parts]))


Inputs = Ragged | Images
Item = str | bytes  # what an encoder takes outside training: a text, or the content of an image file


def joined(parts: Sequence[Inputs]) -> Inputs:
    """All rows of all parts, in order; the parts are of one kind."""
    kind = type(parts[0])
    return kind.cat(cast(Any, parts))


class Draw(NamedTuple):
    """What a sampler asks for: row numbers, and a number that augmentations are drawn from."""

    rows: list[int]
    seed: int


@dataclass
class Batch:
    """V aligned columns of N examples.

    ``uid (N,)`` names the example; ``label (N,)`` is -1 where there is none (a negative for everyone);
    ``position (N,)`` is the place in its document; ``content (V, N)`` hashes each cell, so that a duplicate is never
    a negative. ``lost`` counts rows that were drawn and could not be read.
    """

    views: tuple[Inputs, ...]
    uid: Tensor
    label: Tensor
    position: Tensor
    content: Tensor
    lost: int = 0

    def __len__(self) -> int:
        return len(self.uid)

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on ``device``."""
        views = tuple(view.to(device) for view in self.views)
        moved = {
            name: getattr(self, name).to(device, non_blocking=True) for name in ("uid", "label", "position", "content")
        }
        return Batch(views, **moved, lost=self.lost)

    def columns(self, *which: int) -> "Batch":
        """The batch whose views are the named columns; a column may be named twice."""
        return replace(self, views=tuple(self.views[v] for v in which), content=self.content[list(which)])


@dataclass(frozen=True)
class Embedded:
    """What the encoder made of a batch: ``z (V, N, D)`` and the batch's ids."""

    z: Tensor
    uid: Tensor
    label: Tensor
    position: Tensor
    content: Tensor

    def __len__(self) -> int:
        return len(self.uid)

    def rows(self, which: Tensor | slice) -> "Embedded":
        """The chosen examples of every view."""
        return Embedded(
            self.z[:, which], self.uid[which], self.label[which], self.position[which], self.content[:, which]
        )


@dataclass(frozen=True)
class Terms:
    """A loss over this call's anchors: ``total ()`` its sum, ``count ()`` what the mean divides by.

    ``stats`` are what is logged, each ``(2,)``: a detached sum, and what its mean divides by.
    """

    total: Tensor
    count: Tensor
    stats: dict[str, Tensor] = field(default_factory=dict)


class Loss(Protocol):
    """``(anchors, keys) -> Terms``: pure; it sees no model, no trainer and no text."""

    def __call__(self, anchors: Embedded, keys: Embedded) -> Terms: ...


class Source(Protocol):
    """Rows of text or of images: ``columns`` names the columns that are views, in order.

    A cell is a text, or an image as ``{"bytes": content or None, "path": file or name}`` (``datasets`` stores it so).
    """

    @property
    def columns(self) -> Sequence[str]: ...

    def rows(self) -> Any:
        """A ``datasets.Dataset`` (or an iterable one): the columns, and ``label`` and ``position`` if known."""
        ...

    def fingerprint(self) -> str:
        """The same for the same rows, another for others: names the cache."""
        ...


class Encode(Protocol):
    """``texts or images -> (N, D)`` float32 on the CPU: all that an evaluator sees of a model."""

    def __call__(self, items: Sequence[Item]) -> Tensor: ...


class Rows(Protocol):
    """A source made ready: ``rows[draw]`` is a batch; ``label (N,)`` and ``position (N,)`` are -1 where there is none."""

    @property
    def label(self) -> Tensor: ...

    @property
    def position(self) -> Tensor: ...

    def __len__(self) -> int: ...

    def __getitem__(self, draw: Draw) -> Batch: ...


class Evaluator(Protocol):
    """``encode -> {"<suite>/<task>/<metric>": value}``."""

    def __call__(self, encode: Encode) -> dict[str, float]: ...
