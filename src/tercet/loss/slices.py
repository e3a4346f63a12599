"""A loss is a sum over anchors: of many, some at a time, with nothing kept for the backward pass but the embeddings."""

import torch
from torch.utils.checkpoint import checkpoint

from tercet.contract import Embedded, Loss, Terms

DENSE = 1 << 24  # scores that are computed at once and kept: 64 MiB of them in float32
TILE = 1 << 22  # scores of a slice where there are more


def in_slices(loss: Loss, anchors: Embedded, keys: Embedded, blocks: int) -> Terms:
    """``loss(anchors, keys)``, a sum over anchors, in O(N·D + tile) memory; it makes ``blocks`` score matrices n x N.

    Up to ``DENSE`` scores it is one call. Beyond, the anchors come in slices of ``TILE`` scores, each computed again in
    the backward pass: the same value and gradient.
    """
    columns = max(1, len(keys) * blocks)
    if len(anchors) * columns <= DENSE:
        return loss(anchors, keys)
    step = max(1, TILE // columns)
    parts = [_slice(loss, anchors.rows(slice(i, i + step)), keys) for i in range(0, len(anchors), step)]
    stats = {name: torch.stack([part.stats[name] for part in parts]).sum(0) for name in parts[0].stats}
    total, count = (torch.stack([getattr(part, name) for part in parts]).sum() for name in ("total", "count"))
    return Terms(total, count, stats)


def _slice(loss: Loss, anchors: Embedded, keys: Embedded) -> Terms:
    if not torch.is_grad_enabled():
        return loss(anchors, keys)
    terms: Terms = checkpoint(loss, anchors, keys, use_reentrant=False, preserve_rng_state=False)
    return terms
