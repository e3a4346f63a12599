"""Dropout by seed, and attention within short rows of packed tokens, in one kernel for each direction.

Written in Triton, which comes with CUDA builds of torch. On a CPU they run, slowly, in Triton's interpreter: set
``TRITON_INTERPRET=1`` before anything imports Triton.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tercet.rng import BITS

LONGEST, WIDEST = 128, 128  # tokens of a row, whose keys are one block, and elements of each
CAPABILITY = (8, 0)  # the first GPUs with bf16
LARGEST = {True: 128 * 128, False: 128 * 64}  # elements of a block, where a program has 160 KB of shared memory or less
DRAWS = 256  # 64-bit numbers that a program of dropout draws
WARPS = {16: 1, 32: 2, 64: 4, 128: 8}  # of a program of attention, by its block of keys; products in float32 need twice as many


def available(device: torch.device, longest: int = 1, d: int = 1) -> bool:
    """Whether the kernels run here: on a GPU that they are made for, or anywhere in Triton's interpreter.

    For attention, pass the longest row and the size of a head: a row's keys must fit into the GPU's shared memory.
    """
    block = block_size(longest) * block_size(d)
    return longest <= LONGEST and d <= WIDEST and block <= _largest_block(device)


def longest_available(device: torch.device, d: int) -> int:
    """The longest row that attention of heads of this size runs on here; 0 where it does not run."""
    return next((n for n in reversed(WARPS) if available(device, n, d)), 0)


@cache
def _largest_block(device: torch.device) -> int:
    """How many elements a block of keys may have; 0 where no kernel runs."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return 0
    if os.environ.get("TRITON_INTERPRET") == "1":
        return LARGEST[True]
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < CAPABILITY:
        return 0
    return LARGEST[torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor >= 160 << 10]


def seeded_dropout(x: Tensor, p: float, seed: Tensor, number: int | None = None) -> Tensor:
    """The same as ``apply_dropout(x, p, derive_seed(seed, number))``; without ``number``, as ``apply_dropout(x, p, seed)``.

    Only the seeds are kept for the backward pass, which draws the mask again.
    """
    if seed.shape != x.shape[:-1]:
        raise ValueError(f"x {tuple(x.shape)} needs seeds of {tuple(x.shape[:-1])}, not {tuple(seed.shape)}.")
    if p >= 1:
        return x * 0
    return _SeededDropout.apply(x, seed, round(p * BITS), number)  # type: ignore[no-untyped-call, no-any-return]


class _SeededDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seed: Tensor, threshold: int, number: int | None) -> Tensor:
        ctx.save_for_backward(seed)
        ctx.settings = threshold, number
        return _drop(x, seed, threshold, number)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _drop(grads[0], ctx.saved_tensors[0], *ctx.settings), None, None, None


def _drop(x: Tensor, seed: Tensor, threshold: int, number: int | None) -> Tensor:
    from tercet.models.engine import triton_jit

    x, seed = x.contiguous(), seed.contiguous()
    out = torch.empty_like(x)
    draws = seed.numel() * -(-x.shape[-1] // 4)
    if draws:
        options = {"H": x.shape[-1], "BLOCK": DRAWS, "num_warps": 4}
        with _on(x.device):
            triton_jit.dropout[(-(-draws // DRAWS),)](x, out, seed, draws, number, threshold, _scale(threshold), **options)
    return out


def _scale(threshold: int) -> float:
    """The factor of what dropout keeps."""
    return BITS / max(BITS - threshold, 1)


class _Attention(NamedTuple):
    """What a call of attention does, tensors aside."""

    longest: int
    scale: float
    threshold: int  # of draws, below which dropout drops
    number: int | None
    window: int | None
    first_only: bool


def short_attention(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, lengths: Tensor, longest: int, scale: float | None = None,
    p: float = 0.0, seed: Tensor | None = None, attend: Tensor | None = None, number: int | None = None,
    window: int | None = None, first_only: bool = False,
) -> Tensor:  # fmt: skip
    """Attention of each row's tokens to the tokens of their row, with the masks of ``apply_dropout``.

    Args:
        q: ``(T, heads, d)``, or ``(N, heads, d)`` if ``first_only``: the first token of each row. Any strides, but 1 for d.
        k: Keys ``(T, heads, d)``.
        v: Values ``(T, heads, d)``.
        starts: ``(N,)``, int64, each row's first token: ``lengths.cumsum(0) - lengths``. Tokens after the last row belong to
            none: they are not read, and their output and gradients are 0.
        lengths: ``(N,)``, int64, each row's number of tokens; 0 for none.
        longest: An upper bound of ``lengths``, at most 128.
        scale: Of the scores; None is d ** -0.5.
        p: Rate of dropout of probabilities.
        seed: ``(len(q),)``, int64, one for each query, which with the head determines what is dropped; None drops nothing.
        attend: ``(T,)``, bool, false for keys that no token attends to.
        number: Mixed into ``seed``, as by ``derive_seed(seed, number)``.
        window: Only tokens nearer than this are seen.
        first_only: Whether the first tokens are the only queries.

    Returns:
        ``(len(q), heads, d)``, contiguous.

    Raises:
        ValueError: For arguments that do not fit, or p > 0 without seeds.
    """
    _check(q, k, v, lengths, longest, p, seed, first_only)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)  # an integer would be compiled in
    settings = _Attention(longest, scale, round(p * BITS), number, window, first_only)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    tensors = q, k, v, starts, lengths, attend, None if p == 0 else seed
    return _ShortAttention.apply(*tensors, settings)  # type: ignore[no-untyped-call, no-any-return]


def _check(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, longest: int, p: float, seed: Tensor | None, first_only: bool
) -> None:
    if longest > LONGEST or q.shape[-1] > WIDEST:
        raise ValueError(f"Rows have up to {LONGEST} tokens of {WIDEST} elements here, not {longest} of {q.shape[-1]}.")
    if k.shape != v.shape or q.shape != (len(lengths) if first_only else len(k), *k.shape[1:]):
        raise ValueError(f"Shapes of {len(lengths)} rows do not fit: {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}.")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"Query, key and value have one dtype, not {q.dtype}, {k.dtype}, {v.dtype}.")
    if p > 0 and (seed is None or seed.shape != q.shape[:1]):
        raise ValueError(f"Dropout needs a seed for each of {len(q)} queries.")


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        from tercet.models.engine import triton_jit

        *tensors, settings = args
        ctx.save_for_backward(*tensors)
        ctx.settings = settings
        q = tensors[0]
        out = _allocate(tensors, *q.shape)
        _launch(triton_jit.attention_forward, tensors, (out,), settings)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from tercet.models.engine import triton_jit

        tensors = ctx.saved_tensors  # read once: recomputation allows no more
        q, k, *_ = tensors
        sizes = len(q), len(k), len(k)
        slopes = _allocate(tensors, sum(sizes), *q.shape[1:]).split(sizes)
        _launch(triton_jit.attention_backward, tensors, (grads[0].contiguous(), *slopes), ctx.settings)
        return *slopes, None, None, None, None, None


def _allocate(tensors: Any, *shape: int) -> Tensor:
    """Memory that the kernel fills; without any row it does not run."""
    q, lengths = tensors[0], tensors[4]
    return (torch.empty if len(lengths) else torch.zeros)(shape, dtype=q.dtype, device=q.device)


def _launch(kernel: Any, tensors: Any, more: tuple[Tensor, ...], settings: _Attention) -> None:
    q, k, v, starts, lengths, attend, seed = tensors
    if not len(lengths):
        return
    heads, d = q.shape[1:]
    block = block_size(settings.longest)
    half = q.dtype.itemsize < 4  # in float32, more queries or fewer warps would not fit into registers
    options = {
        "HEADS": heads, "D": d, "BLOCK_D": block_size(d), "BLOCK": block, "WINDOW": settings.window,
        "BLOCK_Q": min(block, 32) if half and not settings.first_only else 16, "FIRST_ONLY": settings.first_only,
        "num_warps": WARPS[block] * (1 if half else 2), "num_stages": 1,
    }  # fmt: skip
    attend = None if attend is None else attend.contiguous().view(torch.uint8)
    seed = None if seed is None else seed.contiguous()
    rows = starts.contiguous(), lengths.contiguous(), attend, seed
    numbers = len(lengths), len(k), settings.number, settings.threshold, _scale(settings.threshold), settings.scale
    strides = [x.stride(side) for x in (q, k, v) for side in (0, 1)]
    with _on(q.device):
        kernel[(len(lengths) * heads,)](q, k, v, *more, *rows, *numbers, *strides, **options)


def block_size(size: int) -> int:
    """The least power of 2 that is at least ``size`` and 16, the least block of a product."""
    return max(16, 1 << (size - 1).bit_length())


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
