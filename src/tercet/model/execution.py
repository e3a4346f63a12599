"""How rows run through a network: in which order, in what chunks, recomputed or not."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tercet.contract import Ragged
from tercet.error import InputError

ORDERS = ("given", "sorted")


def pad(inputs: Ragged, rows: Tensor, pad_id: int) -> tuple[Tensor, Tensor]:
    """The chosen rows as ``ids (n, L)`` and ``mask (n, L)``, padded on the right to the longest."""
    parts = inputs.rows()
    ids = torch.nn.utils.rnn.pad_sequence([parts[i] for i in rows.tolist()], batch_first=True, padding_value=pad_id)
    mask = torch.arange(ids.shape[1]) < inputs.length[rows][:, None]
    return ids, mask.long().to(ids.device, non_blocking=True)


@dataclass(frozen=True)
class Execution:
    """The plan of a forward pass.

    ``order``: ``given``, or ``sorted`` by length so that a chunk's rows are alike and little is padded.
    ``chunk_tokens``: the padded tokens that one chunk may have; null runs all rows at once.
    ``recompute``: keep no activations, compute each chunk again in the backward pass with the same dropout. That is
    GradCache (Gao et al. 2021, arXiv:2101.06983): the same gradient in the memory of one chunk.
    """

    order: str
    chunk_tokens: int | None
    recompute: bool

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise InputError(f"model.execution.order={self.order}: choose one of {', '.join(ORDERS)}.")
        if self.chunk_tokens is not None and self.chunk_tokens < 1:
            raise InputError(
                f"model.execution.chunk_tokens={self.chunk_tokens}: a number above 0, or null for no chunks."
            )

    def chunks(self, length: Tensor) -> list[Tensor]:
        """``length (N,)`` to index tensors that together name each row once; a row too long for the budget runs alone."""
        order = (
            torch.argsort(length, descending=True, stable=True) if self.order == "sorted" else torch.arange(len(length))
        )
        if self.chunk_tokens is None:
            return [order]
        cuts, start, longest = [0], 0, 0
        for i, n in enumerate(length[order].tolist()):
            longest = max(longest, n)
            if i > start and longest * (i + 1 - start) > self.chunk_tokens:
                cuts.append(i)
                start, longest = i, n
        return list(order.tensor_split(cuts[1:]))

    def padded_tokens(self, length: Tensor) -> int:
        """How many tokens, padding among them, the plan computes."""
        return sum(len(rows) * int(length[rows].max()) for rows in self.chunks(length) if len(rows))

    def run(self, function: Callable[[Tensor, Tensor], Tensor], inputs: Ragged, pad_id: int) -> Tensor:
        """Apply ``(ids (n, L), mask (n, L)) -> (n, ...)`` to all rows; the result is in the order of the input."""
        chunks = self.chunks(inputs.length)
        parts = []
        for rows in chunks:
            ids, mask = pad(inputs, rows, pad_id)
            if self.recompute and torch.is_grad_enabled():
                parts.append(checkpoint(function, ids, mask, use_reentrant=False))
            else:
                parts.append(function(ids, mask))
        return torch.cat(parts)[torch.argsort(torch.cat(chunks))]


PLAIN = Execution(order="given", chunk_tokens=None, recompute=False)
