"""Cross-validation: which rows are held out when."""

import torch
from torch import Tensor

from tercet.error import InputError


def stratified(label: Tensor, folds: int, seed: int, what: str) -> Tensor:
    """``(N,)`` the fold of each row, so that every label (N,) has its share in each; drawn from ``seed``.

    Raises:
        InputError: a label has fewer rows than there are folds, so that one would lack it; ``what`` names the data.
    """
    counts = torch.bincount(label)
    if few := [i for i, n in enumerate(counts.tolist()) if 0 < n < folds]:
        raise InputError(
            f"{what}: the label number {few[0]} (in alphabetical order) has {int(counts[few[0]])} rows, fewer than the "
            f"{folds} folds; one would lack it. Use evaluation.folds={max(2, int(counts[few[0]]))}, add rows or leave "
            "the task out of evaluation.tasks."
        )
    draw = torch.rand(len(label), generator=torch.Generator().manual_seed(seed))
    order = draw.argsort()
    order = order[label[order].argsort(stable=True)]  # by label, at random among equals
    fold = torch.empty_like(label)
    fold[order] = torch.arange(len(label)) % folds
    return fold
