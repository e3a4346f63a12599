"""How rows run through a network: in which order, in what chunks, recomputed or not."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tercet.contract import Images, Inputs, Ragged
from tercet.error import InputError

ORDERS = ("given", "sorted")


def pad(inputs: Ragged, rows: Tensor, pad_id: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The chosen rows as ``ids (n, L)`` and ``mask (n, L)``, padded on the right to the longest; what travels with them."""
    ids = _padded(inputs.ids, inputs.length, rows, pad_id)
    mask = torch.arange(ids.shape[1]) < inputs.length[rows][:, None]
    more = {name: _padded(value, inputs.length, rows, 0) for name, value in inputs.more.items()}
    return ids, mask.long().to(ids.device, non_blocking=True), more


def _padded(values: Tensor, length: Tensor, rows: Tensor, fill: int) -> Tensor:
    parts = values.split(length.tolist())
    return torch.nn.utils.rnn.pad_sequence([parts[i] for i in rows.tolist()], batch_first=True, padding_value=fill)


@dataclass(frozen=True)
class Execution:
    """The plan of a forward pass.

    ``order``: ``given``, or ``sorted`` by length so that a chunk's rows are alike and little is padded.
    ``chunk_tokens``: the padded tokens that one chunk of texts may have; ``chunk_rows``: its rows, of texts or images;
    null is no bound.
    ``recompute``: keep no activations, compute each chunk again in the backward pass with the same dropout. That is
    GradCache (Gao et al. 2021, arXiv:2101.06983): the same gradient in the memory of one chunk.
    """

    order: str
    chunk_tokens: int | None
    chunk_rows: int | None
    recompute: bool

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise InputError(f"model.execution.order={self.order}: choose one of {', '.join(ORDERS)}.")
        for name in ("chunk_tokens", "chunk_rows"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"model.execution.{name}={value}: a number above 0, or null for no chunks.")

    def chunks(self, length: Tensor) -> list[Tensor]:
        """``length (N,)`` to index tensors that together name each row once; a row too long for the budget runs alone."""
        order = (
            torch.argsort(length, descending=True, stable=True) if self.order == "sorted" else torch.arange(len(length))
        )
        tokens, rows = self.chunk_tokens or float("inf"), self.chunk_rows or float("inf")
        cuts, start, longest = [0], 0, 0
        for i, n in enumerate(length[order].tolist()):
            longest = max(longest, n)
            if i > start and (longest * (i + 1 - start) > tokens or i - start >= rows):
                cuts.append(i)
                start, longest = i, n
        return list(order.tensor_split(cuts[1:]))

    def padded_tokens(self, length: Tensor) -> int:
        """How many tokens, padding among them, the plan computes."""
        return sum(len(rows) * int(length[rows].max()) for rows in self.chunks(length) if len(rows))

    def run(self, function: Callable[..., Tensor], inputs: Inputs, pad_id: int = 0) -> Tensor:
        """Apply ``(ids (n, L), mask (n, L)) -> (n, ...)``, or ``pixels (n, C, S, S) -> (n, ...)``, to all rows.

        The result is in the order of the input. What is in ``Ragged.more`` is handed on by its name, ``(n, L, ...)``.
        """
        if isinstance(inputs, Images):
            parts = inputs.pixels.split(self.chunk_rows or max(1, len(inputs)))
            return torch.cat([self._apply(function, part) for part in parts])
        chunks = self.chunks(inputs.length)
        done = []
        for rows in chunks:
            ids, mask, more = pad(inputs, rows, pad_id)
            done.append(self._apply(function, ids, mask, **more))
        return torch.cat(done)[torch.argsort(torch.cat(chunks))]

    def _apply(self, function: Callable[..., Tensor], *arguments: Tensor, **more: Tensor) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            out: Tensor = checkpoint(partial(function, **more), *arguments, use_reentrant=False)
            return out
        return function(*arguments, **more)


PLAIN = Execution(order="given", chunk_tokens=None, chunk_rows=None, recompute=False)
