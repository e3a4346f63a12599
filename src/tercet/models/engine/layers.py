"""Layers of a backbone that do what torch's do and take less time."""

import weakref
from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tercet.models.engine.packing import autocast_dtype
from tercet.types import runs_on_cpu

KEPT = 1 << 28  # bytes of a gradient whose memory is kept, at most


def replace_layers(module: nn.Module) -> None:
    """Give the layers of ``module`` that are replaced here their new class; weights, names and hooks stay as they are."""
    for part in module.modules():
        if type(part) is nn.LayerNorm:
            part.__class__ = HalfLayerNorm
        elif type(part) is nn.Embedding and not (part.sparse or part.scale_grad_by_freq or part.max_norm):
            part.__class__ = ReusingEmbedding
            part.__dict__["memory"] = GradientMemory()


class HalfLayerNorm(nn.LayerNorm):
    """Layer normalization with bf16 results under bf16 autocast on a GPU, computed in float32.

    torch's results are float32 there, and each of the linear layers that follow casts them by itself. This is faster and less
    exact: where they are the residual stream, as in BERT, the gradient has about three times the rounding error.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``(..., H)``."""
        half = x.is_cuda and autocast_dtype(x.device) == torch.bfloat16
        if not half or self.weight is None or self.bias is None:
            return super().forward(x)
        with torch.autocast("cuda", enabled=False):
            weight, bias = self.weight.bfloat16(), self.bias.bfloat16()
            return F.layer_norm(x.bfloat16(), self.normalized_shape, weight, bias, self.eps)


class ReusingEmbedding(nn.Embedding):
    """An embedding whose gradient on a CPU is written to the same memory in each backward pass.

    torch's gradient is new memory, of a row for each word of the vocabulary, which the operating system supplies page by page.
    """

    memory: "GradientMemory"

    def forward(self, ids: Tensor) -> Tensor:
        """``(...)`` to ``(..., H)``."""
        weight = self.weight
        trained = weight.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        plain = type(weight.data) is Tensor and weight.dtype == torch.float32 and runs_on_cpu(weight.device)
        if not trained or not plain:
            return super().forward(ids)
        return _Lookup.apply(weight, ids, self.padding_idx, self.memory)  # type: ignore[no-untyped-call, no-any-return]


class GradientMemory:
    """Memory for tensors of one shape, in float32; a tensor's is used again when the tensor has been freed."""

    def __init__(self) -> None:
        self.free: deque[npt.NDArray[np.float32]] = deque(maxlen=2)  # in use at a time: the sum, and a chunk's part of it

    def zeros(self, shape: torch.Size) -> Tensor:
        """A tensor of zeros."""
        memory = self.free.pop() if self.free else None
        if memory is None or memory.shape != shape:
            memory = np.empty(shape, np.float32)
        view = memory[:]  # which the tensor keeps alive
        if memory.nbytes <= KEPT:
            weakref.finalize(view, self.free.append, memory).atexit = False
        return torch.from_numpy(view).zero_()

    def __reduce__(self) -> Any:
        return GradientMemory, ()  # a copy has memory of its own


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, padding_idx: int | None, memory: GradientMemory) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape, ctx.padding_idx, ctx.memory = weight.shape, padding_idx, memory
        return F.embedding(ids, weight, padding_idx)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (ids,), grad = ctx.saved_tensors, grads[0]
        if torch.is_grad_enabled():  # it is differentiated itself
            skipped = -1 if ctx.padding_idx is None else ctx.padding_idx
            return torch.ops.aten.embedding_dense_backward(grad, ids, ctx.shape[0], skipped, False), None, None, None
        found = ctx.memory.zeros(ctx.shape).index_add_(0, ids.flatten(), grad.reshape(-1, ctx.shape[1]))
        if ctx.padding_idx is not None:
            found[ctx.padding_idx] = 0
        return found, None, None, None
