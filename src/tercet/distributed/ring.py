"""The loss of this process's anchors against the keys of all processes, which are gathered or circulate in a ring.

In a ring each process holds the block of keys of one other process at a time. The blocks go around once in each pass; in the
backward pass they take along the gradient that every process has for them (Inf-CL: Cheng et al. 2024, arXiv:2410.17243).
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tercet.distributed.gather import gather_embeddings, gather_number
from tercet.types import Embeddings, Loss, LossOutput, at_least_float32

RING_BYTES = 1 << 30  # keys (float32) above this size are not gathered under ``key_exchange`` "auto"


@runtime_checkable
class BlockwiseLoss(Loss, Protocol):
    """A loss that can process its keys in blocks. ``key_exchange`` is "gather", "ring", or "auto": a ring if they are large."""

    key_exchange: str

    def prepare(self, side: Embeddings) -> Embeddings:
        """Transform rows, such as normalizing them, before ``block_statistics``."""

    def block_statistics(self, anchors: Embeddings, keys: Embeddings) -> Tensor:
        """Statistics ``(n, ...)`` of each anchor over one block of keys."""

    def combine(self, statistics: Tensor) -> LossOutput:
        """The loss, of the statistics ``(B, n, ...)`` of all B blocks."""

    def parameters(self) -> Iterator[Any]:
        """Learned parameters of the loss."""


def contrast(
    loss: Loss, anchors: Embeddings, extend: Callable[[Embeddings], Embeddings] | None = None
) -> tuple[Embeddings, LossOutput]:
    """Score this process's anchors against the keys of all processes.

    Returns the keys that this process holds (in a ring its own rows) and the loss of its anchors, of which ``reduce_loss``
    makes the mean. ``extend`` adds keys to the gathered ones, as a cross-batch memory does, and rules out an "auto" ring.

    >>> from tercet.losses import TripletLoss
    >>> z, row, label = torch.eye(3)[None], torch.arange(3), torch.tensor([0, 0, 1])
    >>> keys, output = contrast(TripletLoss(margin=0.2, mining="all"), Embeddings(z, row, label, row, row[None]))
    >>> len(keys), round(float(output.loss_sum), 2), int(output.normalizer)
    (3, 0.4, 2)
    """
    anchors = replace(anchors, z=at_least_float32(anchors.z))  # once, so that gradients of all uses are summed in float32
    counts = gather_number(len(anchors))
    if len(counts) > 1 and isinstance(loss, BlockwiseLoss):
        large = sum(counts) * len(anchors.z) * anchors.z.shape[2] * 4 > RING_BYTES
        if loss.key_exchange == "ring" or (loss.key_exchange == "auto" and large and extend is None):
            own, learned = loss.prepare(anchors), [p for p in loss.parameters() if p.requires_grad]
            return anchors, loss.combine(_Ring.apply(own.z, loss, own, counts, *learned))  # type: ignore[no-untyped-call]
    keys = gather_embeddings(anchors, counts)
    return keys, loss(anchors, keys if extend is None else extend(keys))


class _Ring(torch.autograd.Function):
    """``loss.block_statistics(own, block)`` for the block of every process: ``(W, n, ...)``, this process's block first."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, loss: BlockwiseLoss, own: Embeddings, counts: list[int], *learned: Tensor) -> Tensor:
        ctx.loss, ctx.own, ctx.counts = loss, own, counts
        ctx.save_for_backward(z, *learned)
        return torch.stack([loss.block_statistics(own, block) for block in _blocks(own, counts)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, *learned = ctx.saved_tensors
        block_grad = z.new_zeros(len(z), max(ctx.counts), z.shape[2])  # of the block that is here; it travels with the block
        sums = [torch.zeros_like(x) for x in (z, *learned)]
        for grad, block in zip(grads[0], _blocks(ctx.own, ctx.counts), strict=True):
            with torch.enable_grad():
                anchors, keys = (replace(side, z=side.z.detach().requires_grad_()) for side in (ctx.own, block))
                statistics = ctx.loss.block_statistics(anchors, keys)
            of_keys, *others = torch.autograd.grad(statistics, [keys.z, anchors.z, *learned], grad, allow_unused=True)
            block_grad[:, : len(block)] += of_keys
            for total, one in zip(sums, others, strict=True):
                if one is not None:
                    total += one
            block_grad = _pass_on([block_grad])()[0]
        return (sums[0] + block_grad[:, : z.shape[1]], None, None, None, *sums[1:])


def _blocks(own: Embeddings, counts: list[int]) -> Iterator[Embeddings]:
    """The rows of each process, this one's first; the next block arrives while the caller works on the present one."""
    world, rank = len(counts), dist.get_rank()
    ids = torch.cat([torch.stack([own.example_id, own.label, own.position]), own.content_hash])
    more = max(counts) - len(own)  # blocks have equal shapes on the way
    here = [F.pad(own.z.detach().contiguous(), (0, 0, 0, more)), F.pad(ids, (0, more))]
    for step in range(world):
        receive = _pass_on(here) if step < world - 1 else None
        z, rows = (x[:, : counts[(rank - step) % world]] for x in here)
        yield Embeddings(z, rows[0], rows[1], rows[2], rows[3:])
        if receive:
            here = receive()


def _pass_on(tensors: list[Tensor]) -> Callable[[], list[Tensor]]:
    """Start to send to the next process; the result waits for the tensors of the previous one and returns them."""
    world, rank = dist.get_world_size(), dist.get_rank()
    received = [torch.empty_like(tensor) for tensor in tensors]
    sends = [dist.P2POp(dist.isend, tensor, (rank + 1) % world) for tensor in tensors]
    receives = [dist.P2POp(dist.irecv, tensor, (rank - 1) % world) for tensor in received]
    works = dist.batch_isend_irecv(sends + receives)

    def receive() -> list[Tensor]:
        for work in works:
            work.wait()
        return received

    return receive
