"""Dropout that is cheap on a CPU and whose masks can be a function of the row, the same for any number of processes."""

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from tercet.errors import InputError
from tercet.models.engine import triton_kernels as kernels
from tercet.models.engine.transformers_compat import module_number, number_modules
from tercet.rng import BITS, derive_seed
from tercet.types import Batch, TokenBatch, runs_on_cpu

BLOCK = 1 << 17  # elements that a CPU computes at a time


class DropoutSeeds:
    """The seeds that all dropouts of an encoder share: ``seed`` holds one for each token; None means torch's generator."""

    seed: Tensor | None = None


class SeededDropout(nn.Dropout):
    """Dropout with the distribution of ``nn.Dropout``, from 16 random bits an element instead of a float.

    While ``seeds`` holds seeds, a mask is a function of the token's seed, this module's number and the column.
    """

    def __init__(self, p: float, seeds: DropoutSeeds) -> None:
        super().__init__(p)
        self.seeds = seeds

    # In compiled layers, which share their code, each dropout has a number of its own.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor) -> Tensor:
        """``(..., H)``, one seed for each vector of H."""
        seed = self.seeds.seed
        if not self.training or self.p == 0:
            return x
        if seed is None:
            return apply_dropout(x, self.p, None) if x.device.type == "cpu" else super().forward(x)
        if seed.shape != x.shape[:-1]:
            raise InputError(
                f"`execution.dropout`: a dropout of this backbone gets {tuple(x.shape)}, not one vector for each of "
                f"{tuple(seed.shape)} tokens. Use `execution.dropout`=torch."
            )
        if kernels.available(x.device):
            return kernels.seeded_dropout(x, self.p, seed, module_number(self))
        return apply_dropout(x, self.p, derive_seed(seed, module_number(self)))


def apply_dropout(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """Zero a fraction ``p`` of ``x (..., H)`` and scale the rest; ``seed (...)`` determines the mask, None draws from torch."""
    columns = x.shape[-1]
    if seed is None:
        bits = torch.empty(*x.shape[:-1], -(-columns // 4), dtype=torch.long, device=x.device).random_(-(1 << 63), None)
        keep = _kept(bits, p)[..., :columns]
    else:
        keep = draw_kept(seed, p, columns)
    return _MaskAndScale.apply(x, keep, p)  # type: ignore[no-untyped-call, no-any-return]


def draw_kept(seed: Tensor, p: float, columns: int) -> Tensor:
    """Which of ``columns`` elements for each seed dropout with rate ``p`` keeps: ``(...)`` to ``(..., columns)``."""
    numbers = torch.arange(-(-columns // 4), device=seed.device)
    parts = [_kept(derive_seed(own[:, None], numbers), p)[:, :columns] for own in _blocks(seed.flatten(), columns)]
    return (torch.cat(parts) if len(parts) > 1 else parts[0]).view(*seed.shape, columns)


def kept_scale(p: float) -> float:
    """The factor of what is kept."""
    return BITS / max(1, BITS - round(p * BITS))  # of nothing, where p is 1


def _kept(bits: Tensor, p: float) -> Tensor:
    least, drawn = round(p * BITS) - BITS // 2, bits.view(torch.int16)
    if least == BITS // 2:  # p is 1, and this no number of 16 bits, with which they could be compared
        return torch.zeros_like(drawn, dtype=torch.bool)
    kept = torch.empty_like(drawn, dtype=torch.uint8)  # into which a CPU compares several times as fast as into bool
    return torch.ge(drawn, least, out=kept).view(torch.bool)


def _blocks(x: Tensor, columns: int) -> tuple[Tensor, ...]:
    """``x`` in parts of so many rows that a CPU's cache holds what is between two operations."""
    return x.split(max(1, BLOCK // columns)) if runs_on_cpu(x.device) else (x,)


class _MaskAndScale(torch.autograd.Function):
    """``x · keep · kept_scale(p)``, in both directions; one byte is saved for each element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Tensor, p: float) -> Any:
        ctx.save_for_backward(keep)
        ctx.p = p
        if not runs_on_cpu(x.device):
            return torch.ops.aten.native_dropout_backward(x, keep, kept_scale(p))  # computes the same product
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        rows = (part.reshape(-1, x.shape[-1]) for part in (out, x, keep.view(torch.uint8)))
        for to, values, kept in zip(*(_blocks(part, x.shape[-1]) for part in rows), strict=True):
            to.copy_(kept).mul_(values).mul_(kept_scale(p))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _MaskAndScale.apply(grads[0], ctx.saved_tensors[0], ctx.p), None, None  # type: ignore[no-untyped-call]


def replace_dropouts(module: nn.Module) -> DropoutSeeds:
    """Replace every dropout in ``module`` by ``SeededDropout`` and number all modules (attention has its own dropout)."""
    seeds = DropoutSeeds()
    for part in module.modules():
        for name, child in part.named_children():
            if isinstance(child, nn.Dropout):
                setattr(part, name, SeededDropout(child.p, seeds))
    number_modules(module)
    return seeds


def with_dropout_seeds(batch: Batch, seed: int, step: int) -> Batch:
    """The batch with a seed for each token of its texts: a function of (``seed``, ``step``, example, view, position)."""
    example = derive_seed(derive_seed(torch.full_like(batch.example_id, seed), step), batch.example_id)
    row = derive_seed(example, torch.arange(len(batch.views), device=example.device)[:, None]).flatten()
    inputs = cast(TokenBatch, batch.inputs)  # images have no such dropout
    tokens = derive_seed(row.index_select(0, inputs.index.row), inputs.index.position)
    return batch.with_inputs(inputs.same_rows(inputs.ids, replace(inputs.state, dropout_seed=tokens)))
