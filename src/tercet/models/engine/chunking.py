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
    """The plan of a forward pass.

    ``layout`` of texts: ``packed``, no padded token is computed; ``sorted`` by length, so that a chunk's rows are alike
    and little is padded; ``padded`` as they come; ``auto`` is packed where the backbone can, else sorted.
    ``dropout``: ``keyed``, a function of (seed, step, row, view, layer), the same for any number of processes and any
    chunks; ``torch``'s own; ``auto`` is keyed on a CPU, where it costs less than torch's, if the backbone can pack.
    ``chunk_tokens``: the tokens, padding among them, that one chunk of texts may have; ``chunk_rows``: its rows, of texts
    or images; null is no bound. ``chunk_tokens=auto``: as many as free memory has room for, once the first batch is seen.
    ``recompute``: keep no activations, compute each chunk again in the backward pass with the same dropout. That is
    GradCache (Gao et al. 2021, arXiv:2101.06983): the same gradient in the memory of one chunk.
    """

    layout: str
    dropout: str
    chunk_tokens: int | Literal["auto"] | None
    chunk_rows: int | None
    recompute: bool

    def __post_init__(self) -> None:
        for name, known in (("layout", LAYOUTS), ("dropout", DROPOUTS)):
            if (value := getattr(self, name)) not in known:
                raise InputError(f"model.execution.{name}={value}: choose one of {', '.join(known)}.")
        for name in ("chunk_tokens", "chunk_rows"):
            value = getattr(self, name)
            if isinstance(value, str) and (name, value) != ("chunk_tokens", "auto"):
                raise InputError(f"model.execution.{name}={value}: a number, or null. chunk_tokens can be auto.")
            if isinstance(value, int) and value < 1:
                raise InputError(f"model.execution.{name}={value}: a number above 0, or null for no chunks.")

    def unchunked(self) -> "Execution":
        """In one piece, for rows that are a chunk already."""
        return replace(self, chunk_tokens=None, chunk_rows=None, recompute=False)

    def resolve_auto_chunks(self, module: nn.Module, function: Callable[[TokenBatch], Tensor], rows: TokenBatch) -> "Execution":
        """With a number for ``chunk_tokens=auto``: what ``function`` of ``module`` can keep of these ``rows``."""
        if self.chunk_tokens != "auto":
            return self
        tokens = max_chunk_tokens(module, function, rows)
        warn_once(f"model.execution.chunk_tokens=auto is {tokens:,} here.")
        return replace(self, chunk_tokens=tokens)

    def chunks(self, length: Tensor) -> list[Tensor]:
        """``length (N,)`` to index tensors that together name each row once; a row too long for the budget runs alone."""
        order = torch.arange(len(length))
        if self.layout != "padded":
            order = torch.argsort(length, descending=True, stable=True)
        if isinstance(self.chunk_tokens, str):
            raise RuntimeError("chunk_tokens=auto is a number once the encoder has seen a batch.")
        tokens, rows = self.chunk_tokens or float("inf"), self.chunk_rows or float("inf")
        cuts, start, longest, real = [0], 0, 0, 0
        for i, n in enumerate(length[order].tolist()):
            longest, real = max(longest, n), real + n
            used = real if self.layout == "packed" else longest * (i + 1 - start)
            if i > start and (used > tokens or i - start >= rows):
                cuts.append(i)
                start, longest, real = i, n, n
        return list(order.tensor_split(cuts[1:]))

    def computed_tokens(self, length: Tensor) -> int:
        """How many tokens, padding among them, the plan computes."""
        if self.layout == "packed":
            return int(length.sum())
        return sum(len(rows) * int(length[rows].max()) for rows in self.chunks(length) if len(rows))

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
            out: Tensor = checkpoint(_tidied(function), part, use_reentrant=False)
            return out
        return function(part)


def _tidied(function: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
    """Asked twice a chunk: when it is computed, and when it is computed again."""

    def computed(part: Any) -> Tensor:
        trim_heap()
        return function(part)

    return computed


PLAIN = Execution(layout="auto", dropout="auto", chunk_tokens=None, chunk_rows=None, recompute=False)
