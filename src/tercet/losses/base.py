"""What the losses share: calls with plain tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tercet.distributed import contrast, rank, reduce_loss
from tercet.errors import InputError, require
from tercet.types import Embeddings, Loss

Integers = Tensor | Sequence[int]  # or a numpy array


def positive_group(side: Embeddings) -> Tensor:
    """``(N,)``, equal for rows that are positives of each other: the label or, where there is none, the example.

    An example that stands for itself is a negative number, which no label is.
    """
    return torch.where(side.label >= 0, side.label, side.example_id | torch.iinfo(torch.long).min)


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
    per_view = content is None or _tensor("content", content).dim() == 2  # else one for all views
    hashes = _integers("content", content, cells if per_view else row).expand_as(cells)
    label, position = _integers(label_name, label, none), _integers("positions", position, none)
    return Embeddings(z, _integers("ids", ids, row), label, position, hashes)


def _integers(name: str, x: Integers | None, default: Tensor) -> Tensor:
    """``x`` as int64 if it holds integers, as many as ``default`` does; ``default`` in place of None."""
    if x is None:
        return default
    x, shape = _tensor(name, x), default.shape
    whole = not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)
    require(whole, f"`{name}`: integers are needed, got {x.dtype}.")
    require(x.shape == shape, f"`{name}`: shape {tuple(shape)} is needed, one for each row, got {tuple(x.shape)}.")
    return x.to(default.device, torch.long)


def _tensor(name: str, x: Integers) -> Tensor:
    try:
        return torch.as_tensor(x)
    except (TypeError, ValueError, RuntimeError) as error:  # of texts, or of lists of several lengths
        raise InputError(f"`{name}`: a tensor, array or list of integers is needed ({error}).") from error


def check_embeddings(name: str, z: object, views: bool = False, like: Tensor | None = None) -> Tensor:
    """Return ``z`` if it is a float tensor ``(N, D)``, with ``views`` also ``(V, N, D)``, of the shape of ``like`` if given."""
    usable = isinstance(z, Tensor) and z.is_floating_point() and z.dim() in (2, 2 + views) and z.numel() > 0
    if isinstance(z, Tensor) and usable and (like is None or z.shape == like.shape):
        return z
    wanted = "(N, D) or (V, N, D)" if views else "(N, D)" if like is None else f"{tuple(like.shape)}, a row for each anchor,"
    got = f"{z.dtype} {tuple(z.shape)}" if isinstance(z, Tensor) else type(z).__name__
    raise InputError(f"`{name}`: a float tensor of shape {wanted} that is not empty is needed, got {got}.")
