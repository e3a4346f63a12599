"""Where the tokens of concatenated rows are."""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class RowIndex:
    """Where the T tokens of N rows are, on the device of the tokens: made once for a pass, not in each layer.

    Tokens after the last row belong to none: their ``row`` is N and their ``position`` 0.
    """

    lengths: Tensor  # (N,), on the CPU
    longest: int  # L
    start: Tensor  # (N,), the first token of each row
    length: Tensor  # (N,)
    row: Tensor  # (T,)
    position: Tensor  # (T,), in the row

    @staticmethod
    def of(lengths: Tensor, layout: Tensor, tokens: int) -> "RowIndex":
        """The index of ``tokens`` tokens in rows of ``lengths (N,)``, from their layout, which may have more."""
        n, size = len(lengths), len(layout) // 2 - len(lengths)
        start, length, row, position = layout.split([n, n, size, size])
        return RowIndex(lengths, int(lengths.max()) if n else 0, start, length, row[:tokens], position[:tokens])

    @staticmethod
    def layout(lengths: Tensor, tokens: int) -> Tensor:
        """``start``, ``length``, ``row`` and ``position``, ``(2 N + 2 T)`` on the CPU; T is ``tokens``, some of no row."""
        n, start = len(lengths), lengths.cumsum(0) - lengths
        row = torch.repeat_interleave(torch.arange(n), lengths)
        position, more = torch.arange(len(row)) - start[row], (0, tokens - len(row))
        return torch.cat([start, lengths, F.pad(row, more, value=n), F.pad(position, more)])

    @cached_property
    def in_padded(self) -> Tensor:
        """``(T,)``, the index of each token in the flattened ``(N, L)``; N L for those of no row."""
        return self.row * self.longest + self.position

    def pad(self, flat: Tensor, fill: int = 0) -> Tensor:
        """``(T, ...)`` to ``(N, L, ...)``, padded on the right with ``fill``."""
        size = len(self.start) * self.longest
        out = flat.new_full((size + 1, *flat.shape[1:]), fill).index_copy(0, self.in_padded, flat)
        return out[:size].view(len(self.start), -1, *flat.shape[1:])

    def unpad(self, padded: Tensor) -> Tensor:
        """The inverse of ``pad`` where all tokens belong to a row: ``(N, L, ...)`` to ``(T, ...)``."""
        return padded.flatten(0, 1).index_select(0, self.in_padded)

    @cached_property
    def mask(self) -> Tensor:
        """``(N, L)``, true where there is a token."""
        return torch.arange(self.longest, device=self.length.device) < self.length[:, None]


def rounded_tokens(tokens: int) -> int:
    """The number of tokens that a CUDA graph has for so many: up to an eighth more, or a multiple of 256.

    >>> [rounded_tokens(n) for n in (1, 1000, 1800, 14000)]
    [256, 1024, 2048, 14336]
    """
    step = max(256, 1 << max(0, (tokens - 1).bit_length() - 4))
    return -(-tokens // step) * step
