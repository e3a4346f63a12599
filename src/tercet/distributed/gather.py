"""Gather rows with gradient, and means over the global batch. Every function is the identity in a single process."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tercet.types import Embeddings, LossOutput


def world_size() -> int:
    """W, the number of processes.

    >>> world_size(), rank()
    (1, 0)
    """
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The index of this process, 0 to W - 1."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def row_counts(n: int, device: torch.device) -> list[int]:
    """The number of rows in each process, in the order of ranks; ``n`` is this process's."""
    if world_size() == 1:
        return [n]
    return _all_gather(torch.tensor([n], device=device), [1] * world_size()).tolist()


def _all_gather(x: Tensor, counts: list[int]) -> Tensor:
    # all_gather needs equal shapes: shorter processes are padded, and the padding is cut off again.
    padded = x.new_zeros(max(counts), *x.shape[1:])
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


class _GatherRows(torch.autograd.Function):
    """The rows of all processes; the gradient of a row is the sum of its gradients in all processes."""

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
    """Concatenate the rows ``(n, ...)`` of all processes in the order of ranks, without gradient; n may differ.

    >>> gather_rows(torch.tensor([1, 2]))
    tensor([1, 2])
    """
    return x if world_size() == 1 else _all_gather(x, row_counts(len(x), x.device))


def gather_embeddings(own: Embeddings, counts: list[int]) -> Embeddings:
    """Gather the keys of the global batch, with gradient; ``counts`` are the ``row_counts``."""
    if world_size() == 1:
        return own
    z: Tensor = _GatherRows.apply(own.z.transpose(0, 1).contiguous(), counts)  # type: ignore[no-untyped-call]
    example_id, label, position = (_all_gather(x, counts) for x in (own.example_id, own.label, own.position))
    content = _all_gather(own.content_hash.T.contiguous(), counts).T
    return Embeddings(z.transpose(0, 1), example_id, label, position, content)


def reduce_loss(output: LossOutput) -> tuple[Tensor, dict[str, Tensor]]:
    """Return what to differentiate, W · ``loss_sum`` / (sum of all processes' ``normalizer``), and the means to log.

    DDP averages gradients over the W processes, so that the first gives the gradient of a single process on the global
    batch. The second holds the means over the global batch: ``loss``, and each of ``stats``.

    >>> value, logged = reduce_loss(LossOutput(torch.tensor(6.0), torch.tensor(3.0), {"accuracy": torch.tensor([1.5, 6.0])}))
    >>> float(value), {name: float(mean) for name, mean in logged.items()}
    (2.0, {'loss': 2.0, 'accuracy': 0.25})
    """
    exact = torch.float32 if output.loss_sum.device.type == "mps" else torch.float64  # counts of triplets exceed 2^24
    pairs = [torch.stack([output.loss_sum.detach().to(exact), output.normalizer.detach().to(exact)]), *output.stats.values()]
    sums = torch.stack([pair.detach().to(exact) for pair in pairs])
    if world_size() > 1:
        dist.all_reduce(sums)
    counts = sums[:, 1].clamp(min=1)
    value = world_size() * output.loss_sum / counts[0].to(output.loss_sum.dtype)
    return value, dict(zip(["loss", *output.stats], (sums[:, 0] / counts).float(), strict=True))
