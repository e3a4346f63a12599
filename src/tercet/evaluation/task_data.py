"""Tables of scored sentence pairs (STS) and labeled sentences (SentEval)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq
import torch
from torch import Tensor

from tercet.errors import InputError
from tercet.messages import warn_once
from tercet.paths import locate

STS_COLUMNS = ("task", "subset", "split", "sentence1", "sentence2", "score")


def read_table(path: str, columns: Sequence[str] = STS_COLUMNS, other: str = ", or hub") -> Any:
    """A pyarrow table with at least ``columns``; cells of a text format are text. ``other`` ends what is accepted.

    Raises:
        InputError: there is no such file, it cannot be read, or a column is missing.
    """
    accepted = f"a .parquet, .csv, .tsv or .jsonl file with the columns {', '.join(columns)}{other}"
    file = locate(path)
    if not file.is_file():
        what = "is a folder" if file.is_dir() else f"does not exist (looked for {file})"
        raise InputError(f"evaluation.path={path} {what}. It takes {accepted}; relative paths also start in TERCET_DATA.")
    reader = READERS.get(file.suffix.lower())
    if reader is None:
        raise InputError(f"evaluation.path={path} ends in {file.suffix!r}. It takes {accepted}.")
    try:
        table = reader(file)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"evaluation.path={path} cannot be read: {' '.join(str(error).split())}") from error
    if lacking := [name for name in columns if table.column_names.count(name) != 1]:
        raise InputError(
            f"evaluation.path={path} has the columns {', '.join(table.column_names)}; "
            f"{', '.join(lacking)} must be there once. It takes {accepted}."
        )
    return table


def _delimited(file: Path, mark: str) -> Any:
    """Every cell is text: the word "NA" is a sentence like any other."""
    return pyarrow.csv.read_csv(
        file,
        parse_options=pyarrow.csv.ParseOptions(delimiter=mark, newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys((*STS_COLUMNS, "label"), pa.string()), strings_can_be_null=False
        ),
    )


READERS: dict[str, Callable[[Path], Any]] = {
    ".parquet": pq.read_table,
    ".csv": lambda file: _delimited(file, ","),
    ".tsv": lambda file: _delimited(file, "\t"),
    ".jsonl": pyarrow.json.read_json,
}


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
STS_TASKS = tuple(HUB)
ONE_SET = ("STS-B", "SICK-R")  # scored whole, whatever subsets the data names
STS_SPLITS = {
    "test": ("test",),
    "dev": ("dev", "trial", "validation"),
}  # SICK calls its dev split trial, the hub validation


@dataclass(frozen=True)
class ScoredPairs:
    """N pairs of a task: ``gold (N,)`` and ``subset (N,)``, which is None where the data does not tell."""

    first: Sequence[str]
    second: Sequence[str]
    gold: npt.NDArray[np.float64]
    subset: npt.NDArray[np.str_] | None


def read_sts(path: str, tasks: Sequence[str], split: str) -> dict[str, ScoredPairs]:
    """The pairs of each task that is there; ``path`` is a table's, or "hub".

    Sentences have their white space normalised and are never cut. Pairs without a gold score are left out, as SentEval
    does, counted and said; so are tasks that a table lacks.

    Raises:
        InputError: the data cannot be read, has a bad row in these tasks, or none of the tasks.
    """
    if path == "hub":
        return {task: _pairs(path, task, *_hub(task, split)) for task in tasks}
    table = read_table(path)
    cells = {name: np.array(table[name].to_pylist(), dtype=object) for name in STS_COLUMNS}
    chosen = np.isin(cells["split"].astype(str), STS_SPLITS[split])
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
        warn_once(f"evaluation.path={path} has no {split} pairs of {', '.join(missing)}: left out, also of the average.")
    return found


def _hub(task: str, split: str) -> tuple[Mapping[str, Any], Iterable[int]]:
    name, part = HUB[task], "validation" if split == "dev" else split
    try:
        rows = datasets.load_dataset(name, split=part)
        cells = {column: list(rows[column]) for column in ("sentence1", "sentence2", "score")}
    except Exception as error:  # the libraries below raise dozens of kinds
        raise InputError(
            f"evaluation.path=hub: {name}, split {part}, cannot be had ({' '.join(str(error).split())}). "
            f"Name a table with the columns {', '.join(STS_COLUMNS)} in evaluation.path, or leave {task} out of evaluation.tasks."
        ) from error
    return cells, range(1, len(rows) + 1)


def _pairs(path: str, task: str, cells: Mapping[str, Any], numbers: Iterable[int]) -> ScoredPairs:
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
        kept.append((_scored_text(first, "sentence1", where), _scored_text(second, "sentence2", where), str(subset)))
        gold.append(value)
    if dropped := len(cells["score"]) - len(kept):
        warn_once(f"{place}: {dropped} of {len(cells['score'])} pairs of {task} have no gold score and are left out.")
    subset = np.array([name if task not in ONE_SET else task for *_, name in kept], dtype=np.str_)
    told = task in ONE_SET or "subset" in cells
    pairs = ScoredPairs([p[0] for p in kept], [p[1] for p in kept], np.array(gold, dtype=np.float64), subset if told else None)
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
        raise InputError(f"{where}: the score is {score!r}. A finite number is needed, or nothing to leave the row out.")
    return value


def _scored_text(cell: Any, column: str, where: str) -> str:
    if not isinstance(cell, str) or not cell.strip():
        got = "empty" if cell is None or isinstance(cell, str) else f"{cell!r}"
        raise InputError(f"{where}: {column} is {got}, a sentence is needed. Mend or remove the row.")
    return " ".join(cell.split())


def _check_gold(pairs: ScoredPairs, where: str) -> None:
    """A correlation with a constant does not exist; that is the data's fault, no model can score on it."""
    subset = np.zeros(len(pairs.gold), dtype=np.str_) if pairs.subset is None else pairs.subset
    for name in np.unique(subset) if len(subset) else [""]:
        if len(set(pairs.gold[subset == name])) < 2:
            raise InputError(
                f"{where}{f', subset {name}' if name else ''}: fewer than two different gold scores; there is nothing to "
                "correlate with. Mend the data or leave the task out of evaluation.tasks."
            )


TRANSFER_COLUMNS = ("task", "split", "sentence1", "sentence2", "label")
# Which splits a task has, by SentEval's protocol. "all": folds take turns at being the test set.
TRANSFER_SPLITS = {
    "MR": ("all",),
    "CR": ("all",),
    "SUBJ": ("all",),
    "MPQA": ("all",),
    "SST2": ("train", "dev", "test"),
    "TREC": ("train", "test"),
    "MRPC": ("train", "test"),
}
TRANSFER_TASKS = tuple(TRANSFER_SPLITS)
PAIR_TASKS = ("MRPC",)


@dataclass(frozen=True)
class LabeledSentences:
    """N rows of a task: ``label (N,)`` from 0, ``split (N,)``; ``second`` is None where a row is one sentence."""

    first: Sequence[str]
    second: Sequence[str] | None
    label: Tensor
    split: npt.NDArray[np.str_]


def read_transfer(path: str, tasks: Sequence[str]) -> dict[str, LabeledSentences]:
    """The rows of each task that the table has; those that it lacks are said.

    Raises:
        InputError: the table cannot be read, has a bad row in these tasks, or none of the tasks.
    """
    table = read_table(path, TRANSFER_COLUMNS, "")
    cells = {name: np.array(table[name].to_pylist(), dtype=object) for name in TRANSFER_COLUMNS}
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
        warn_once(f"evaluation.path={path} has no rows of {', '.join(missing)}: left out, also of the average.")
    return found


def _rows(path: str, task: str, cells: dict[str, Any], numbers: npt.NDArray[np.int64]) -> LabeledSentences:
    where = [f"evaluation.path={path}, row {number} ({task})" for number in numbers]
    wanted = TRANSFER_SPLITS[task]
    for place, split in zip(where, cells["split"], strict=True):
        if split not in wanted:
            raise InputError(f"{place}: the split is {split!r}; {task} has {', '.join(wanted)}. Mend or remove the row.")
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
        for side in (("sentence1", "sentence2") if task in PAIR_TASKS else ("sentence1",))
    ]
    second = sides[1] if task in PAIR_TASKS else None
    return LabeledSentences(sides[0], second, torch.from_numpy(number), cells["split"].astype(str))


def _text(cell: Any, column: str, where: str) -> str:
    if not isinstance(cell, str) or not cell.strip():
        raise InputError(f"{where}: {column} is {cell!r}, a sentence is needed. Mend or remove the row.")
    return " ".join(cell.split())
