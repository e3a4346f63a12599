"""A loss is a sum over anchors: of many, some at a time, with nothing kept for the backward pass but the embeddings."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tercet.types import Embeddings

DENSE = 1 << 22  # scores that are computed at once and kept: 16 MiB of them in float32, several times
TILE = 1 << 22  # scores of a slice where there are more
ROWS = 256  # of a slice at least: each adds up a gradient of all keys


def apply_in_slices(
    table: Callable[[Embeddings, Embeddings], Tensor], anchors: Embeddings, keys: Embeddings, blocks: int
) -> Tensor:
    """``table(anchors, keys)``, ``(n, ...)``, a row for each anchor, in O(N·D + tile) memory.

    ``blocks`` is how many score matrices ``n x N`` it makes. Up to ``DENSE`` scores it is one call. Beyond, the anchors
    come in slices of ``TILE`` scores, each computed again in the backward pass: the same values and gradient.
    """
    columns = max(1, len(keys) * blocks)
    if len(anchors) * columns <= DENSE:
        return table(anchors, keys)
    step = max(ROWS, TILE // columns)
    # One split: the gradient of a slice taken by itself would be as large as all anchors.
    parts = anchors.z.split(step, 1)
    starts = range(0, len(anchors), step)
    slices = [replace(anchors.select(slice(i, i + step)), z=z) for i, z in zip(starts, parts, strict=True)]
    if not torch.is_grad_enabled():
        return torch.cat([table(some, keys) for some in slices])
    return torch.cat([checkpoint(table, some, keys, use_reentrant=False, preserve_rng_state=False) for some in slices])
