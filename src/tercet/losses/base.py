"""What the losses share: calls with plain tensors, and computation in slices of anchors."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tercet.distributed import contrast, rank, reduce_loss
from tercet.errors import InputError
from tercet.types import Embeddings, Loss

Integers = Tensor | Sequence[int]  # or a numpy array

DENSE = 1 << 22  # scores that are computed at once and kept for the backward pass: 16 MiB in float32, several times
TILE = 1 << 22  # scores of a slice where there are more
MIN_ROWS = 256  # anchors of a slice at least: the backward pass of each slice adds a gradient of all keys


def mean_loss(loss: Loss, anchors: Embeddings) -> Tensor:
    """The mean over the anchors of all processes, a scalar: keys are gathered with gradient where there are several.

    Its gradient, averaged over the processes as DDP does, is the gradient of one process on the global batch.
    """
    return reduce_loss(contrast(loss, anchors)[1])[0]


def make_embeddings(
    z: Tensor, label: Tensor | None = None, position: Tensor | None = None,
    ids: Integers | None = None, content: Integers | None = None,
) -> Embeddings:  # fmt: skip
    """Embeddings of ``z (V, N, D)``; what is left out is made: no label and position (-1), ids and contents all distinct.

    ``content`` is ``(N,)``, the same in all views, or ``(V, N)``.
    """
    views, n = z.shape[:2]
    row = torch.arange(n, device=z.device) + (rank() << 40)  # distinct in all processes
    none = torch.full_like(row, -1)
    if content is None:
        hashes = row * views + torch.arange(views, device=z.device)[:, None]
    else:
        per_view = torch.as_tensor(content).dim() == 2
        hashes = check_integers("content", content, z, (views, n) if per_view else (n,)).expand(views, n)
    label, position = (none if x is None else x for x in (label, position))
    return Embeddings(z, row if ids is None else check_integers("ids", ids, z, (n,)), label, position, hashes)


def check_embeddings(name: str, z: object, views: bool = False, like: Tensor | None = None) -> Tensor:
    """Return ``z`` if it is a float tensor ``(N, D)``, with ``views`` also ``(V, N, D)``, of the shape of ``like`` if given."""
    usable = isinstance(z, Tensor) and z.is_floating_point() and z.dim() in (2, 2 + views) and z.numel() > 0
    if isinstance(z, Tensor) and usable and (like is None or z.shape == like.shape):
        return z
    wanted = "(N, D) or (V, N, D)" if views else "(N, D)" if like is None else f"{tuple(like.shape)}, a row for each anchor,"
    got = f"{z.dtype} {tuple(z.shape)}" if isinstance(z, Tensor) else type(z).__name__
    raise InputError(f"`{name}`: a float tensor of shape {wanted} that is not empty is needed, got {got}.")


def check_integers(name: str, x: Integers, z: Tensor, shape: tuple[int, ...]) -> Tensor:
    """``x`` as int64 on the device of ``z``, if it holds integers of this shape."""
    x = torch.as_tensor(x)
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise InputError(f"`{name}`: integers are needed, got {x.dtype}.")
    if x.shape != shape:
        raise InputError(f"`{name}`: shape {tuple(shape)} is needed, one for each row of the embeddings, got {tuple(x.shape)}.")
    return x.to(z.device, torch.long)


def apply_in_slices(
    function: Callable[[Embeddings, Embeddings], Tensor], anchors: Embeddings, keys: Embeddings, blocks: int
) -> Tensor:
    """``function(anchors, keys)``, ``(n, ...)`` with a row for each anchor, in O(N·D + tile) memory.

    ``blocks`` is the number of score matrices ``n x N`` that it makes. Up to ``DENSE`` scores it is one call. Beyond, the
    anchors come in slices of ``TILE`` scores, each computed again in the backward pass: the same values and gradient.
    """
    columns = max(1, len(keys) * blocks)
    if len(anchors) * columns <= DENSE:
        return function(anchors, keys)
    step = max(MIN_ROWS, TILE // columns)
    # One split: the gradient of a slice taken by itself would be as large as all anchors.
    parts = anchors.z.split(step, 1)
    starts = range(0, len(anchors), step)
    slices = [replace(anchors.select(slice(i, i + step)), z=z) for i, z in zip(starts, parts, strict=True)]
    if not torch.is_grad_enabled():
        return torch.cat([function(part, keys) for part in slices])
    return torch.cat([checkpoint(function, part, keys, use_reentrant=False, preserve_rng_state=False) for part in slices])
