"""What the losses share: calls with plain tensors, and computation in slices of anchors."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tercet.distributed import contrast, rank, reduce_loss
from tercet.errors import InputError, require
from tercet.types import Embeddings, Loss

Integers = Tensor | Sequence[int]  # or a numpy array
Statistics = Callable[[Embeddings, Embeddings], Tensor]

DENSE = 1 << 22  # scores that are computed at once and kept for the backward pass: 16 MiB in float32, several times
TILE = 1 << 22  # scores of a slice where there are more
MIN_ROWS = 256  # anchors of a slice at least: the backward pass of each slice adds a gradient of all keys


def mean_loss(loss: Loss, anchors: Embeddings) -> Tensor:
    """The mean over the anchors of all processes, whose gradient, averaged as DDP does, is that of the global batch."""
    return reduce_loss(contrast(loss, anchors)[1])[0]


def make_embeddings(
    z: Tensor, ids: Integers | None, content: Integers | None, label: Integers | None, position: Integers | None = None,
    label_name: str = "labels",
) -> Embeddings:  # fmt: skip
    """Embeddings of ``z (V, N, D)``; what is None is made: no label and position (-1), ids and contents all distinct."""
    row = torch.arange(z.shape[1], device=z.device) + (rank() << 40)  # distinct in all processes
    none = torch.full_like(row, -1)
    cells = row * len(z) + torch.arange(len(z), device=z.device)[:, None]
    per_view = content is None or torch.as_tensor(content).dim() == 2  # else one for all views
    hashes = _integers("content", content, cells if per_view else row).expand_as(cells)
    label, position = _integers(label_name, label, none), _integers("positions", position, none)
    return Embeddings(z, _integers("ids", ids, row), label, position, hashes)


def _integers(name: str, x: Integers | None, default: Tensor) -> Tensor:
    """``x`` as int64 if it holds integers, as many as ``default`` does; ``default`` in place of None."""
    if x is None:
        return default
    x, shape = torch.as_tensor(x), default.shape
    whole = not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)
    require(whole, f"`{name}`: integers are needed, got {x.dtype}.")
    require(x.shape == shape, f"`{name}`: shape {tuple(shape)} is needed, one for each row, got {tuple(x.shape)}.")
    return x.to(default.device, torch.long)


def check_embeddings(name: str, z: object, views: bool = False, like: Tensor | None = None) -> Tensor:
    """Return ``z`` if it is a float tensor ``(N, D)``, with ``views`` also ``(V, N, D)``, of the shape of ``like`` if given."""
    usable = isinstance(z, Tensor) and z.is_floating_point() and z.dim() in (2, 2 + views) and z.numel() > 0
    if isinstance(z, Tensor) and usable and (like is None or z.shape == like.shape):
        return z
    wanted = "(N, D) or (V, N, D)" if views else "(N, D)" if like is None else f"{tuple(like.shape)}, a row for each anchor,"
    got = f"{z.dtype} {tuple(z.shape)}" if isinstance(z, Tensor) else type(z).__name__
    raise InputError(f"`{name}`: a float tensor of shape {wanted} that is not empty is needed, got {got}.")


def apply_in_slices(function: Statistics, anchors: Embeddings, keys: Embeddings, blocks: int) -> Tensor:
    """``function(anchors, keys)``, ``(n, ...)``, which makes ``blocks`` score matrices ``n x N``, in O(N·D + tile) memory.

    Up to ``DENSE`` scores it is one call. Beyond, the anchors come in slices of ``TILE`` scores, each computed again in the
    backward pass: the same values and gradient.
    """
    columns = max(1, len(keys) * blocks)
    if len(anchors) * columns <= DENSE:
        return function(anchors, keys)
    step = max(MIN_ROWS, TILE // columns)
    # One split: the gradient of a slice taken by itself would be as large as all anchors.
    parts = zip(range(0, len(anchors), step), anchors.z.split(step, 1), strict=True)
    slices = [replace(anchors.select(slice(start, start + step)), z=z) for start, z in parts]
    return torch.cat([checkpoint(function, part, keys, use_reentrant=False, preserve_rng_state=False) for part in slices])
