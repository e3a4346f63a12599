"""Gather rows with gradient, and means over the global batch. Every function is the identity in a single process."""

from functools import lru_cache
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


def gather_number(n: int) -> list[int]:
    """The number ``n`` of each process, in the order of ranks. Hosts exchange it: no device is read."""
    if world_size() == 1:
        return [n]
    numbers = [torch.empty(1, dtype=torch.long) for _ in range(world_size())]
    dist.all_gather(numbers, torch.tensor([n]), _group(numbers[0]))
    return [int(number) for number in numbers]


def largest(number: int) -> int:
    """The largest of the processes' numbers. Hosts exchange it, no device does.

    >>> largest(3)
    3
    """
    return max(gather_number(number))


def _group(x: Tensor) -> dist.ProcessGroup | None:
    """The group that exchanges tensors of the device of ``x``."""
    return _host_group(dist.group.WORLD) if x.device.type == "cpu" else None


@lru_cache(maxsize=1)
def _host_group(world: dist.ProcessGroup) -> dist.ProcessGroup:
    """All processes, as a group that exchanges tensors of the CPU."""
    return world if "cpu:" in dist.get_backend_config(world) else dist.new_group(backend="gloo")


def _all_gather(x: Tensor, counts: list[int]) -> Tensor:
    x = _pad(x, max(counts))  # all_gather needs equal shapes: the padding is cut off again
    parts = [torch.empty_like(x) for _ in counts]
    dist.all_gather(parts, x, _group(x))
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def _pad(x: Tensor, n: int) -> Tensor:
    """``x`` with rows of zeros after its own, n in all."""
    return x.contiguous() if len(x) == n else torch.cat([x, x.new_zeros(n - len(x), *x.shape[1:])])


class _GatherRows(torch.autograd.Function):
    """``x (n, D)`` and integers ``(n, K)`` of all processes; the gradient of a row is the sum of its gradients in all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, integers: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
        ctx.counts = counts
        together = [part.contiguous().view(torch.uint8) for part in (integers, x)]
        gathered = _all_gather(torch.cat(together, 1), counts).split([part.shape[1] for part in together], 1)
        all_integers, all_x = (part.contiguous().view(own.dtype) for part, own in zip(gathered, (integers, x), strict=True))
        ctx.mark_non_differentiable(all_integers)
        return all_x, all_integers

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        most = max(ctx.counts)
        total = grad.new_empty(most, *grad.shape[1:])
        dist.reduce_scatter(total, [_pad(part, most) for part in grad.split(ctx.counts)], group=_group(total))
        return total[: ctx.counts[rank()]], None, None


def gather_rows(x: Tensor) -> Tensor:
    """Concatenate the rows ``(n, ...)`` of all processes in the order of ranks, without gradient; n may differ.

    >>> gather_rows(torch.tensor([1, 2]))
    tensor([1, 2])
    """
    return x if world_size() == 1 else _all_gather(x, gather_number(len(x)))


def gather_embeddings(own: Embeddings, counts: list[int]) -> Embeddings:
    """Gather the keys of the global batch in one collective, with gradient; ``counts`` are the numbers of rows."""
    if world_size() == 1:
        return own
    integers = torch.stack([own.example_id, own.label, own.position, *own.content_hash], 1)
    z, integers = _GatherRows.apply(own.z.transpose(0, 1).flatten(1), integers, counts)  # type: ignore[no-untyped-call]
    z, rows = z.unflatten(1, (len(own.z), -1)).transpose(0, 1), integers.T.contiguous()
    return Embeddings(z, rows[0], rows[1], rows[2], rows[3:])


def reduce_loss(output: LossOutput) -> tuple[Tensor, dict[str, Tensor]]:
    """Return what to differentiate, W · ``loss_sum`` / (sum of all processes' ``normalizer``), and the means to log.

    DDP averages gradients over the W processes, so that the first gives the gradient of a single process on the global
    batch. The second holds the means over the global batch: ``loss``, and each of ``stats``.

    >>> value, logged = reduce_loss(LossOutput(torch.tensor(6.0), torch.tensor(3.0), {"accuracy": torch.tensor([1.5, 6.0])}))
    >>> float(value), {name: float(mean) for name, mean in logged.items()}
    (2.0, {'loss': 2.0, 'accuracy': 0.25})
    """
    exact = torch.float32 if output.loss_sum.device.type == "mps" else torch.float64  # counts of triplets exceed 2^24
    own = torch.stack([output.loss_sum.detach().to(exact), output.normalizer.detach().to(exact)])
    sums = torch.cat([own, *(pair.detach() for pair in output.stats.values())]).to(exact).view(-1, 2)
    if world_size() > 1:
        dist.all_reduce(sums)
    counts = sums[:, 1].clamp(min=1)
    value = output.loss_sum * (world_size() / counts[0]).to(output.loss_sum.dtype)
    return value, dict(zip(["loss", *output.stats], (sums[:, 0] / counts).float().unbind(), strict=True))
