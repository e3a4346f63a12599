"""Keys in a ring: each process sees one other's block at a time, and nobody holds all of them.

The blocks go around once in the forward pass and once in the backward pass, where each takes along the gradient that
every process has for it (as Inf-CL does: Cheng et al. 2024, arXiv:2410.17243, section 3.3).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from tercet.types import Embeddings, Loss, LossOutput

Parts = Callable[[Embeddings, Embeddings], Tensor]


@runtime_checkable
class BlockwiseLoss(Loss, Protocol):
    """A loss that can meet its keys block by block: ``parts`` of ``ready`` rows and each block, then all ``merged``."""

    key_exchange: str

    def prepare(self, side: Embeddings) -> Embeddings:
        """Rows as ``parts`` wants them."""

    def block_statistics(self, anchors: Embeddings, keys: Embeddings) -> Tensor:
        """``(n, ...)``, what these keys are to each anchor."""

    def combine(self, parts: Tensor) -> LossOutput:
        """The loss, of ``parts (B, n, ...)`` of all blocks."""

    def parameters(self) -> Iterator[Any]:
        """What is learned besides the rows."""


def ring_statistics(parts: Parts, own: Embeddings, counts: list[int], parameters: Sequence[Tensor]) -> Tensor:
    """``parts(own, block)`` for the block of every process: ``(W, n, ...)``, in the order in which they come by.

    ``counts (W)``: the rows of each process. ``parameters`` are what ``parts`` depends on besides the rows.
    """
    learned = [p for p in parameters if p.requires_grad]
    found: Tensor = _Ring.apply(own.z, parts, own, counts, *learned)  # type: ignore[no-untyped-call]
    return found


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, parts: Parts, own: Embeddings, counts: list[int], *learned: Tensor) -> Tensor:
        ctx.parts, ctx.own, ctx.counts = parts, own, counts
        ctx.save_for_backward(z, *learned)
        return torch.stack([parts(own, block) for block in _blocks(own, counts)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, *learned = ctx.saved_tensors
        home = z.new_zeros(len(z), max(ctx.counts), z.shape[2])  # what is known of the block that is here
        sums = [torch.zeros_like(x) for x in (z, *learned)]
        for grad, block in zip(grads[0], _blocks(ctx.own, ctx.counts), strict=True):
            with torch.enable_grad():
                anchors, keys = (replace(side, z=side.z.detach().requires_grad_()) for side in (ctx.own, block))
                found = ctx.parts(anchors, keys)
            of_keys, *others = torch.autograd.grad(found, [keys.z, anchors.z, *learned], grad, allow_unused=True)
            home[:, : len(block)] += of_keys
            for total, one in zip(sums, others, strict=True):
                if one is not None:
                    total += one
            home = _passed_on([home])()[0]
        return (sums[0] + home[:, : z.shape[1]], None, None, None, *sums[1:])


def _blocks(own: Embeddings, counts: list[int]) -> Any:
    """Each process's rows, one's own first; the next ones travel while the caller works on these."""
    world, rank = len(counts), dist.get_rank()
    ids = torch.cat([torch.stack([own.example_id, own.label, own.position]), own.content_hash])
    here = [_filled(own.z.detach(), max(counts)), _filled(ids, max(counts))]
    for step in range(world):
        arrive = _passed_on(here) if step < world - 1 else None
        n = counts[(rank - step) % world]
        z, rows = here[0][:, :n], here[1][:, :n]
        yield Embeddings(z, rows[0], rows[1], rows[2], rows[3:])
        if arrive:
            here = arrive()


def _passed_on(tensors: list[Tensor]) -> Callable[[], list[Tensor]]:
    """Send to the next process; the result waits for what comes from the one before."""
    world, rank = dist.get_world_size(), dist.get_rank()
    coming = [torch.empty_like(tensor) for tensor in tensors]
    sends = [dist.P2POp(dist.isend, tensor, (rank + 1) % world) for tensor in tensors]
    receives = [dist.P2POp(dist.irecv, tensor, (rank - 1) % world) for tensor in coming]
    works = dist.batch_isend_irecv(sends + receives)

    def arrive() -> list[Tensor]:
        for work in works:
            work.wait()
        return coming

    return arrive


def _filled(x: Tensor, n: int) -> Tensor:
    out = x.new_zeros(len(x), n, *x.shape[2:])
    out[:, : x.shape[1]] = x
    return out
