"""Several processes as one: gather with gradient, means over the global batch. The identity in a single process."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tercet.types import Embeddings, LossOutput


def world_size() -> int:
    """W, the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, 0 to W - 1."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def row_counts(n: int, device: torch.device) -> list[int]:
    """The number of rows in each process; ``n`` is this one's."""
    if world_size() == 1:
        return [n]
    counts = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([n], device=device))
    return [int(count) for count in counts]


def _all_gather(x: Tensor, counts: list[int]) -> Tensor:
    # all_gather wants equal shapes: the shorter ranks are filled up, and cut again.
    filled = x.new_zeros(max(counts), *x.shape[1:])
    filled[: len(x)] = x
    parts = [torch.empty_like(filled) for _ in counts]
    dist.all_gather(parts, filled)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


class _GatherRows(torch.autograd.Function):
    """All processes' rows; the gradient of a row is the sum of what every process says about it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        return _all_gather(x, counts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].contiguous()
        dist.all_reduce(grad)
        return torch.split(grad, ctx.counts)[rank()], None


def gather_rows(x: Tensor) -> Tensor:
    """``(n, ...)`` of each process to ``(sum n, ...)`` in all of them, in the order of ranks and without gradient."""
    return x if world_size() == 1 else _all_gather(x, row_counts(len(x), x.device))


def gather_embeddings(own: Embeddings, counts: list[int]) -> Embeddings:
    """The keys of the global batch, with gradient; ``counts (W)``: the ``sizes``, ranks may hold different ones."""
    if world_size() == 1:
        return own
    rows: Tensor = _GatherRows.apply(own.z.transpose(0, 1).contiguous(), counts)  # type: ignore[no-untyped-call]
    z = rows.transpose(0, 1)
    uid, label, position = (_all_gather(x, counts) for x in (own.example_id, own.label, own.position))
    return Embeddings(z, uid, label, position, _all_gather(own.content_hash.T.contiguous(), counts).T)


def reduce_loss(terms: LossOutput) -> tuple[Tensor, dict[str, Tensor]]:
    """What to differentiate and what to log.

    The first is W · total / (sum of all counts): DDP averages over W processes, so that the gradient is the one of a
    single process on the global batch. The second holds the global means, ``loss`` among them.
    """
    exact = torch.float32 if terms.loss_sum.device.type == "mps" else torch.float64  # counts of triplets exceed 2^24
    pairs = [
        torch.stack([terms.loss_sum.detach().to(exact), terms.normalizer.detach().to(exact)]),
        *terms.stats.values(),
    ]
    sums = torch.stack([pair.detach().to(exact) for pair in pairs])
    if world_size() > 1:
        dist.all_reduce(sums)
    counts = sums[:, 1].clamp(min=1)
    means = (sums[:, 0] / counts).float()
    value = world_size() * terms.loss_sum / counts[0].to(terms.loss_sum.dtype)
    return value, dict(zip(["loss", *terms.stats], means, strict=True))
