"""Sentence pairs with gold scores of similarity, from a table or from the hub."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt

from tercet.error import InputError
from tercet.evaluation.read import COLUMNS, read_table
from tercet.notice import say_once

# The hub's copies do not say which subset a pair is from.
HUB = {
    "STS12": "mteb/sts12-sts",
    "STS13": "mteb/sts13-sts",
    "STS14": "mteb/sts14-sts",
    "STS15": "mteb/sts15-sts",
    "STS16": "mteb/sts16-sts",
    "STS-B": "mteb/stsbenchmark-sts",
    "SICK-R": "mteb/sickr-sts",
}
TASKS = tuple(HUB)
ONE_SET = ("STS-B", "SICK-R")  # scored whole, whatever subsets the data names
SPLITS = {
    "test": ("test",),
    "dev": ("dev", "trial", "validation"),
}  # SICK calls its dev split trial, the hub validation


@dataclass(frozen=True)
class Pairs:
    """N pairs of a task: ``gold (N,)`` and ``subset (N,)``, which is None where the data does not tell."""

    first: Sequence[str]
    second: Sequence[str]
    gold: npt.NDArray[np.float64]
    subset: npt.NDArray[np.str_] | None


def read_pairs(path: str, tasks: Sequence[str], split: str) -> dict[str, Pairs]:
    """The pairs of each task that is there; ``path`` is a table's, or "hub".

    Sentences have their white space normalised and are never cut. Pairs without a gold score are left out, as SentEval
    does, counted and said; so are tasks that a table lacks.

    Raises:
        InputError: the data cannot be read, has a bad row in these tasks, or none of the tasks.
    """
    if path == "hub":
        return {task: _pairs(path, task, *_hub(task, split)) for task in tasks}
    table = read_table(path)
    cells = {name: np.array(table[name].to_pylist(), dtype=object) for name in COLUMNS}
    chosen = np.isin(cells["split"].astype(str), SPLITS[split])
    found = {}
    for task in tasks:
        rows = np.flatnonzero(chosen & (cells["task"] == task))
        if len(rows):
            found[task] = _pairs(path, task, {name: column[rows] for name, column in cells.items()}, rows + 1)
    if not found:
        has = sorted({f"{t} {s}" for t, s in zip(cells["task"], cells["split"], strict=True)})
        raise InputError(
            f"evaluation.path={path} has no {split} pairs of {', '.join(tasks)}. It holds: {', '.join(has[:12])}. "
            "Change evaluation.tasks, evaluation.split or evaluation.path."
        )
    if missing := [task for task in tasks if task not in found]:
        say_once(f"evaluation.path={path} has no {split} pairs of {', '.join(missing)}: left out, also of the average.")
    return found


def _hub(task: str, split: str) -> tuple[Mapping[str, Any], Iterable[int]]:
    name, part = HUB[task], "validation" if split == "dev" else split
    try:
        rows = datasets.load_dataset(name, split=part)
        cells = {column: list(rows[column]) for column in ("sentence1", "sentence2", "score")}
    except Exception as error:  # the libraries below raise dozens of kinds
        raise InputError(
            f"evaluation.path=hub: {name}, split {part}, cannot be had ({' '.join(str(error).split())}). "
            f"Name a table with the columns {', '.join(COLUMNS)} in evaluation.path, or leave {task} out of evaluation.tasks."
        ) from error
    return cells, range(1, len(rows) + 1)


def _pairs(path: str, task: str, cells: Mapping[str, Any], numbers: Iterable[int]) -> Pairs:
    """``cells`` are columns; ``numbers`` are the rows' places in the data, from 1."""
    place = f"evaluation.path={path}" + (f" ({HUB[task]})" if path == "hub" else "")
    subsets = cells.get("subset", [None] * len(cells["score"]))
    kept, gold = [], []
    for number, first, second, score, subset in zip(
        numbers, cells["sentence1"], cells["sentence2"], cells["score"], subsets, strict=True
    ):
        where = f"{place}, row {number} ({task})"
        value = _number(score, where)
        if np.isnan(value):
            continue
        if task not in ONE_SET and "subset" in cells and not subset:
            raise InputError(f"{where}: the subset is empty. {task} is scored by subset: mend the row.")
        kept.append((_text(first, "sentence1", where), _text(second, "sentence2", where), str(subset)))
        gold.append(value)
    if dropped := len(cells["score"]) - len(kept):
        say_once(f"{place}: {dropped} of {len(cells['score'])} pairs of {task} have no gold score and are left out.")
    subset = np.array([name if task not in ONE_SET else task for *_, name in kept], dtype=np.str_)
    told = task in ONE_SET or "subset" in cells
    pairs = Pairs(
        [p[0] for p in kept], [p[1] for p in kept], np.array(gold, dtype=np.float64), subset if told else None
    )
    _check_gold(pairs, f"{place}, {task}")
    return pairs


def _number(score: Any, where: str) -> float:
    """NaN where there is none."""
    if score is None or (isinstance(score, str) and not score.strip()):
        return np.nan
    try:
        value = float(score)
    except (TypeError, ValueError):
        value = np.inf
    if np.isinf(value):
        raise InputError(
            f"{where}: the score is {score!r}. A finite number is needed, or nothing to leave the row out."
        )
    return value


def _text(cell: Any, column: str, where: str) -> str:
    if not isinstance(cell, str) or not cell.strip():
        got = "empty" if cell is None or isinstance(cell, str) else f"{cell!r}"
        raise InputError(f"{where}: {column} is {got}, a sentence is needed. Mend or remove the row.")
    return " ".join(cell.split())


def _check_gold(pairs: Pairs, where: str) -> None:
    """A correlation with a constant does not exist; that is the data's fault, no model can score on it."""
    subset = np.zeros(len(pairs.gold), dtype=np.str_) if pairs.subset is None else pairs.subset
    for name in np.unique(subset) if len(subset) else [""]:
        if len(set(pairs.gold[subset == name])) < 2:
            raise InputError(
                f"{where}{f', subset {name}' if name else ''}: fewer than two different gold scores; there is nothing to "
                "correlate with. Mend the data or leave the task out of evaluation.tasks."
            )
