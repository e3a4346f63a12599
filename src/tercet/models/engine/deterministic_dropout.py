"""Dropout that is cheap on a CPU and whose masks can be a function of the row, the same for any number of processes."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tercet.errors import InputError
from tercet.models.engine.transformers_compat import module_number, number_modules
from tercet.rng import FIRST, GOLDEN, SECOND, derive_seed, logical_shift_right
from tercet.types import Batch, TokenBatch

BITS = 1 << 16  # a draw has 16 bits: a rate is rounded to a multiple of 1/65536


class DropoutSeeds:
    """The seeds that all dropouts of an encoder share: ``seed`` holds one for each token; None means torch's generator."""

    def __init__(self) -> None:
        self.seed: Tensor | None = None


class SeededDropout(nn.Dropout):
    """Dropout with the distribution of ``nn.Dropout``, from 16 random bits an element instead of a float.

    While ``seeds`` holds seeds, a mask is a function of the token's seed, this layer's ``number`` and the column.
    """

    def __init__(self, p: float, number: int, seeds: DropoutSeeds) -> None:
        super().__init__(p)
        self.number = number
        self.seeds = seeds

    def forward(self, x: Tensor) -> Tensor:
        """``(..., H)``, one seed for each vector of H."""
        if not self.training or self.p == 0:
            return x
        seed = self.seeds.seed
        if seed is None and x.device.type != "cpu":
            return super().forward(x)
        if seed is not None and seed.shape != x.shape[:-1]:
            raise InputError(
                f"`execution.dropout`: a dropout of this backbone gets {tuple(x.shape)}, not one vector for each of "
                f"{tuple(seed.shape)} tokens. Use `execution.dropout`=torch."
            )
        return apply_dropout(x, self.p, None if seed is None else derive_seed(seed, self.number))


def apply_dropout(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """Zero a fraction ``p`` of ``x (..., H)`` and scale the rest; ``seed (...)`` determines the mask, None draws from torch."""
    if p >= 1:
        return x * 0
    quarter = -(-x.shape[-1] // 4)
    if seed is None:
        bits = torch.empty(*x.shape[:-1], quarter, dtype=torch.long, device=x.device).random_(-(1 << 63), None)
    else:
        bits = _splitmix(seed, quarter)
    threshold = round(p * BITS)
    keep = bits.view(torch.int16)[..., : x.shape[-1]] >= threshold - BITS // 2
    out: Tensor = _MaskAndScale.apply(x, keep, BITS / (BITS - threshold))  # type: ignore[no-untyped-call]
    return out


def _splitmix(seed: Tensor, count: int) -> Tensor:
    """``(...)`` to ``(..., count)``: the next 64-bit numbers of SplitMix64."""
    x = seed[..., None] + torch.arange(1, count + 1, device=seed.device) * GOLDEN
    x.bitwise_xor_(logical_shift_right(x, 30)).mul_(FIRST)
    x.bitwise_xor_(logical_shift_right(x, 27)).mul_(SECOND)
    x.bitwise_xor_(logical_shift_right(x, 31))
    return x


class _MaskAndScale(torch.autograd.Function):
    """``x · keep · scale`` in one pass over memory, in both directions; one byte is saved for each element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(keep)
        ctx.scale = scale
        out: Tensor = torch.ops.aten.native_dropout_backward(x, keep, scale)  # computes the same product
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _MaskAndScale.apply(grads[0], ctx.saved_tensors[0], ctx.scale), None, None  # type: ignore[no-untyped-call]


def replace_dropouts(module: nn.Module) -> DropoutSeeds:
    """Replace every dropout in ``module`` by ``SeededDropout`` and number all modules (attention has its own dropout)."""
    seeds = DropoutSeeds()
    for part in module.modules():
        for name, child in part.named_children():
            if isinstance(child, nn.Dropout):
                setattr(part, name, SeededDropout(child.p, 0, seeds))
    number_modules(module)
    for part in module.modules():
        if isinstance(part, SeededDropout):
            part.number = module_number(part)
    return seeds


def with_dropout_seeds(batch: Batch, seed: int, step: int) -> Batch:
    """The batch with a seed for each token: a function of (``seed``, ``step``, example, view, position).

    Images are left unchanged.
    """
    row = derive_seed(derive_seed(torch.full_like(batch.example_id, seed), step), batch.example_id)
    views = (
        _seed_tokens(view, derive_seed(row, number)) if isinstance(view, TokenBatch) else view
        for number, view in enumerate(batch.views)
    )
    return replace(batch, views=tuple(views))


def _seed_tokens(view: TokenBatch, row: Tensor) -> TokenBatch:
    tokens = torch.repeat_interleave(row, view.lengths.to(row.device), output_size=len(view.ids))
    return replace(view, state=replace(view.state, dropout_seed=derive_seed(tokens, view.default("position"))))
