"""Dropout as a function of what it is for: the same for any number of processes, any chunks, and after a resume."""

from dataclasses import replace

import torch
from torch import Tensor

from tercet.chance import mixed
from tercet.contract import Batch, Ragged


def keyed(batch: Batch, seed: int, step: int) -> Batch:
    """The batch with a seed for each token: a function of (``seed``, ``step``, the example, the view, the place).

    The encoder's dropouts draw from it, each by its own number. Images stay as they are.
    """
    row = mixed(mixed(torch.full_like(batch.uid, seed), step), batch.uid)
    views = (
        _with(view, mixed(row, number)) if isinstance(view, Ragged) else view for number, view in enumerate(batch.views)
    )
    return replace(batch, views=tuple(views))


def _with(view: Ragged, row: Tensor) -> Ragged:
    tokens = torch.repeat_interleave(row, view.length.to(row.device), output_size=len(view.ids))
    return replace(view, more={**view.more, "noise": mixed(tokens, view.unchanged("place"))})
