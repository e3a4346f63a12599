"""Sentences, or pairs of them, with a class: SentEval's tasks from a table."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tercet.error import InputError
from tercet.evaluation.read import read_table
from tercet.notice import say_once

COLUMNS = ("task", "split", "sentence1", "sentence2", "label")
# Which splits a task has, by SentEval's protocol. "all": folds take turns at being the test set.
SPLITS = {
    "MR": ("all",),
    "CR": ("all",),
    "SUBJ": ("all",),
    "MPQA": ("all",),
    "SST2": ("train", "dev", "test"),
    "TREC": ("train", "test"),
    "MRPC": ("train", "test"),
}
TASKS = tuple(SPLITS)
PAIRS = ("MRPC",)


@dataclass(frozen=True)
class Classified:
    """N rows of a task: ``label (N,)`` from 0, ``split (N,)``; ``second`` is None where a row is one sentence."""

    first: Sequence[str]
    second: Sequence[str] | None
    label: Tensor
    split: npt.NDArray[np.str_]


def read_classified(path: str, tasks: Sequence[str]) -> dict[str, Classified]:
    """The rows of each task that the table has; those that it lacks are said.

    Raises:
        InputError: the table cannot be read, has a bad row in these tasks, or none of the tasks.
    """
    table = read_table(path, COLUMNS, "")
    cells = {name: np.array(table[name].to_pylist(), dtype=object) for name in COLUMNS}
    found = {}
    for task in tasks:
        rows = np.flatnonzero(cells["task"] == task)
        if len(rows):
            found[task] = _rows(path, task, {name: column[rows] for name, column in cells.items()}, rows + 1)
    if not found:
        has = ", ".join(sorted(set(map(str, cells["task"])))[:12])
        raise InputError(
            f"evaluation.path={path} has none of {', '.join(tasks)}. It holds: {has or 'no rows'}. "
            "Change evaluation.tasks or evaluation.path."
        )
    if missing := [task for task in tasks if task not in found]:
        say_once(f"evaluation.path={path} has no rows of {', '.join(missing)}: left out, also of the average.")
    return found


def _rows(path: str, task: str, cells: dict[str, Any], numbers: npt.NDArray[np.int64]) -> Classified:
    where = [f"evaluation.path={path}, row {number} ({task})" for number in numbers]
    wanted = SPLITS[task]
    for place, split in zip(where, cells["split"], strict=True):
        if split not in wanted:
            raise InputError(
                f"{place}: the split is {split!r}; {task} has {', '.join(wanted)}. Mend or remove the row."
            )
    if lacking := [split for split in wanted if split not in cells["split"]]:
        raise InputError(
            f"evaluation.path={path} has no {lacking[0]} rows of {task}. Add them, or leave {task} out of evaluation.tasks."
        )
    label = np.array([str(value) if value is not None else "" for value in cells["label"]])
    if (label == "").any():
        raise InputError(f"{where[int((label == '').argmax())]}: there is no label. Mend or remove the row.")
    names, number = np.unique(label, return_inverse=True)
    if len(names) < 2:
        raise InputError(f"evaluation.path={path}, {task}: every label is {names[0]}; there is nothing to tell apart.")
    sides = [
        [_text(cell, side, place) for cell, place in zip(cells[side], where, strict=True)]
        for side in (("sentence1", "sentence2") if task in PAIRS else ("sentence1",))
    ]
    second = sides[1] if task in PAIRS else None
    return Classified(sides[0], second, torch.from_numpy(number), cells["split"].astype(str))


def _text(cell: Any, column: str, where: str) -> str:
    if not isinstance(cell, str) or not cell.strip():
        raise InputError(f"{where}: {column} is {cell!r}, a sentence is needed. Mend or remove the row.")
    return " ".join(cell.split())
