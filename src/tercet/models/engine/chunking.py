"""How rows run through a network: in which order, in what chunks, recomputed or not."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tercet.errors import InputError
from tercet.messages import warn_once
from tercet.models.engine.autochunk import max_chunk_tokens, trim_heap
from tercet.types import Images, Inputs, TokenBatch

LAYOUTS = ("auto", "packed", "sorted", "padded")
DROPOUTS = ("auto", "torch", "deterministic")


@dataclass(frozen=True)
class Execution:
    """Settings of a forward pass. They change speed and memory, not the result.

    ``layout`` of texts: ``packed`` concatenates rows and computes no padding; ``sorted`` orders rows by length, so that
    little of a chunk is padding; ``padded`` keeps the order; ``auto`` is packed if the backbone can, else sorted.
    ``dropout``: ``deterministic`` makes masks a function of (seed, step, row, view, layer), the same for any number of
    processes and any chunks; ``torch`` is torch's own; ``auto`` is deterministic on a CPU, where it costs less than
    torch's, if the backbone can pack.
    ``chunk_tokens``: the most tokens of one chunk of texts, padding included; ``chunk_rows``: its most rows, of texts or
    images; None is no limit. ``chunk_tokens="auto"``: as many as fit into free memory, measured on the first batch.
    ``recompute``: save no activations and compute each chunk again in the backward pass, with the same dropout. This is
    GradCache (Gao et al. 2021, arXiv:2101.06983): the same gradient in the memory of one chunk.

    >>> execution = Execution(layout="sorted", chunk_tokens=8)
    >>> [chunk.tolist() for chunk in execution.chunks(torch.tensor([2, 7, 3, 4]))]
    [[1], [3, 2], [0]]
    """

    layout: str = "auto"
    dropout: str = "auto"
    chunk_tokens: int | Literal["auto"] | None = None
    chunk_rows: int | None = None
    recompute: bool = False

    def __post_init__(self) -> None:
        for name, known in (("layout", LAYOUTS), ("dropout", DROPOUTS)):
            if (value := getattr(self, name)) not in known:
                raise InputError(f"`{name}`={value}: choose one of {', '.join(known)}.")
        for name in ("chunk_tokens", "chunk_rows"):
            value = getattr(self, name)
            if isinstance(value, str) and (name, value) != ("chunk_tokens", "auto"):
                raise InputError(f"`{name}`={value}: a number, or null. `chunk_tokens` can be auto.")
            if isinstance(value, int) and value < 1:
                raise InputError(f"`{name}`={value}: a number above 0, or null for no chunks.")

    def unchunked(self) -> "Execution":
        """The same in one pass, for rows that are a chunk already."""
        return replace(self, chunk_tokens=None, chunk_rows=None, recompute=False)

    def chunks(self, lengths: Tensor) -> list[Tensor]:
        """``lengths (N,)`` to tensors of row indices, each row in one; a row above the limit is a chunk of its own."""
        order = torch.arange(len(lengths))
        if self.layout != "padded":
            order = torch.argsort(lengths, descending=True, stable=True)
        if isinstance(self.chunk_tokens, str):
            raise RuntimeError("chunk_tokens='auto' has to be resolved first, by Encoder.execution_for.")
        tokens, rows = self.chunk_tokens or float("inf"), self.chunk_rows or float("inf")
        cuts, start, longest, real = [0], 0, 0, 0
        for i, n in enumerate(lengths[order].tolist()):
            longest, real = max(longest, n), real + n
            used = real if self.layout == "packed" else longest * (i + 1 - start)
            if i > start and (used > tokens or i - start >= rows):
                cuts.append(i)
                start, longest, real = i, n, n
        return list(order.tensor_split(cuts[1:]))

    def computed_tokens(self, lengths: Tensor) -> int:
        """How many tokens are computed for rows of these lengths, padding included."""
        if self.layout == "packed":
            return int(lengths.sum())
        return sum(len(rows) * int(lengths[rows].max()) for rows in self.chunks(lengths) if len(rows))

    def num_passes(self, inputs: Inputs) -> int:
        """How often ``run`` calls its function."""
        if isinstance(inputs, Images):
            return -(-len(inputs) // (self.chunk_rows or max(1, len(inputs))))
        return len(self.chunks(inputs.lengths))

    def run(self, function: Callable[[Any], Tensor], inputs: Inputs) -> Tensor:
        """Apply ``n rows of texts -> (n, ...)``, or ``pixels (n, C, S, S) -> (n, ...)``, to all rows.

        The result is in the order of the input.
        """
        if isinstance(inputs, Images):
            parts = inputs.pixels.split(self.chunk_rows or max(1, len(inputs)))
            return torch.cat([self._apply(function, part) for part in parts])
        chunks = self.chunks(inputs.lengths)
        done = [self._apply(function, inputs.select(rows)) for rows in chunks]
        back = torch.argsort(torch.cat(chunks)).to(done[0].device, non_blocking=True)
        return torch.cat(done)[back]

    def _apply(self, function: Callable[[Any], Tensor], part: TokenBatch | Tensor) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            out: Tensor = checkpoint(_trimming(function), part, use_reentrant=False)
            return out
        return function(part)


def _trimming(function: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
    """``function`` with the heap trimmed before each call: twice a chunk, as it is computed again in the backward pass."""

    def trim_and_call(part: Any) -> Tensor:
        trim_heap()
        return function(part)

    return trim_and_call


DEFAULT_EXECUTION = Execution()


class AutoChunks:
    """Resolves ``chunk_tokens="auto"``: the number is measured on the first batch and kept."""

    def __init__(self) -> None:
        self.tokens: int | None = None

    def resolve(
        self, execution: Execution, module: nn.Module, function: Callable[[TokenBatch], Tensor], rows: TokenBatch
    ) -> Execution:
        """``execution`` with a number for ``chunk_tokens``: the activations of ``function`` of ``module`` on ``rows`` fit."""
        if execution.chunk_tokens != "auto":
            return execution
        if self.tokens is None:
            self.tokens = max_chunk_tokens(module, function, rows)
            warn_once(f"chunk_tokens=auto is {self.tokens:,} here.")
        return replace(execution, chunk_tokens=self.tokens)
