"""Dropout that costs little on a CPU, and that can be a function of the row it is for."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tercet.errors import InputError
from tercet.rng import FIRST, GOLDEN, SECOND, derive_seed, logical_shift_right
from tercet.types import Batch, TokenBatch

BITS = 1 << 16  # a draw has 16 bits: a rate is rounded to a multiple of 1/65536


class DropoutSeeds:
    """What the dropouts of an encoder draw from: ``seed``, one for each token of what is computed now; None is torch's."""

    def __init__(self) -> None:
        self.seed: Tensor | None = None


class SeededDropout(nn.Dropout):
    """torch's law by another stream of numbers: 16 random bits an element in place of a float.

    Where ``noise`` holds seeds, a mask is a function of the token's seed, this layer's ``number`` and the column.
    """

    def __init__(self, p: float, number: int, noise: DropoutSeeds) -> None:
        super().__init__(p)
        self.number = number
        self.noise = noise

    def forward(self, x: Tensor) -> Tensor:
        """``(..., H)``, one seed for each vector of H."""
        if not self.training or self.p == 0:
            return x
        seed = self.noise.seed
        if seed is None and x.device.type != "cpu":
            return super().forward(x)
        if seed is not None and seed.shape != x.shape[:-1]:
            raise InputError(
                f"model.execution.dropout: a dropout of this backbone sees {tuple(x.shape)}, not one vector for each of "
                f"{tuple(seed.shape)} tokens. Use model.execution.dropout=torch."
            )
        return apply_dropout(x, self.p, None if seed is None else derive_seed(seed, self.number))


def apply_dropout(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """``x (..., H)`` with shares of ``p`` zero and the rest scaled; ``seed (...)`` decides which, None lets torch."""
    if p >= 1:
        return x * 0
    quarter = -(-x.shape[-1] // 4)
    if seed is None:
        bits = torch.empty(*x.shape[:-1], quarter, dtype=torch.long, device=x.device).random_(-(1 << 63), None)
    else:
        bits = _spread(seed, quarter)
    threshold = round(p * BITS)
    keep = bits.view(torch.int16)[..., : x.shape[-1]] >= threshold - BITS // 2
    out: Tensor = _Drop.apply(x, keep, BITS / (BITS - threshold))  # type: ignore[no-untyped-call]
    return out


def _spread(seed: Tensor, count: int) -> Tensor:
    """``(...)`` to ``(..., count)`` numbers of 64 bits: those that SplitMix64 gives one after the other."""
    x = seed[..., None] + torch.arange(1, count + 1, device=seed.device) * GOLDEN
    x.bitwise_xor_(logical_shift_right(x, 30)).mul_(FIRST)
    x.bitwise_xor_(logical_shift_right(x, 27)).mul_(SECOND)
    x.bitwise_xor_(logical_shift_right(x, 31))
    return x


class _Drop(torch.autograd.Function):
    """``x · keep · scale`` in one pass over memory, both ways; a byte is kept for each element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(keep)
        ctx.scale = scale
        out: Tensor = torch.ops.aten.native_dropout_backward(x, keep, scale)  # in name only: this is what it computes
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _Drop.apply(grads[0], ctx.saved_tensors[0], ctx.scale), None, None  # type: ignore[no-untyped-call]


def replace_dropouts(module: nn.Module) -> DropoutSeeds:
    """Every dropout in ``module`` by ours; each gets its number, and the attention layers too, which draw on their own."""
    noise = DropoutSeeds()
    for number, part in enumerate(module.modules()):
        part.tercet_number = number  # type: ignore[assignment]
        for name, child in part.named_children():
            if isinstance(child, nn.Dropout):
                setattr(part, name, SeededDropout(child.p, 0, noise))
    for number, part in enumerate(module.modules()):
        if isinstance(part, SeededDropout):
            part.number = number
    return noise


def with_dropout_seeds(batch: Batch, seed: int, step: int) -> Batch:
    """The batch with a seed for each token: a function of (``seed``, ``step``, the example, the view, the place).

    The encoder's dropouts draw from it, each by its own number. Images stay as they are.
    """
    row = derive_seed(derive_seed(torch.full_like(batch.example_id, seed), step), batch.example_id)
    views = (
        _with(view, derive_seed(row, number)) if isinstance(view, TokenBatch) else view
        for number, view in enumerate(batch.views)
    )
    return replace(batch, views=tuple(views))


def _with(view: TokenBatch, row: Tensor) -> TokenBatch:
    tokens = torch.repeat_interleave(row, view.lengths.to(row.device), output_size=len(view.ids))
    return replace(view, state=replace(view.state, dropout_seed=derive_seed(tokens, view.default("position"))))
