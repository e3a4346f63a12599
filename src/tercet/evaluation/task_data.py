"""Tables of STS pairs, of SentEval's labeled sentences, and of pairs of faces: reading and checking."""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
TRANSFER_COLUMNS = ("task", "split", "sentence1", "sentence2", "label")
PAIR_COLUMNS = ("fold", "same", "identity1", "image1", "identity2", "image2")


def find_input(path: str | Path, parameter: str, accepted: str, suffixes: Iterable[str]) -> Path:
    """Locate a file with one of the ``suffixes``; raise ``InputError`` about ``parameter`` where there is none."""
    file = locate(str(path))
    if not file.is_file():
        what = "is a folder" if file.is_dir() else f"does not exist (looked for {file})"
        raise InputError(f"`{parameter}`={path} {what}. It takes {accepted}; relative paths also start in TERCET_DATA.")
    if file.suffix.lower() not in suffixes:
        raise InputError(f"`{parameter}`={path} ends in {file.suffix!r}. It takes {accepted}.")
    return file


def read_table(path: str | Path, parameter: str, columns: Sequence[str], accepted: str) -> Any:
    """Read a pyarrow table that has ``columns``, once each, or raise ``InputError``; cells of a text format are text."""
    file = find_input(path, parameter, accepted, READERS)
    try:
        table = READERS[file.suffix.lower()](file)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"`{parameter}`={path} cannot be read: {' '.join(str(error).split())}") from error
    if lacking := [name for name in columns if table.column_names.count(name) != 1]:
        raise InputError(
            f"`{parameter}`={path} has the columns {', '.join(table.column_names)}; "
            f"{', '.join(lacking)} must be there once. It takes {accepted}."
        )
    return table


def _read_delimited(file: Path, delimiter: str) -> Any:
    """Every cell is text: the word "NA" is a sentence like any other."""
    columns = {*STS_COLUMNS, *TRANSFER_COLUMNS, *PAIR_COLUMNS}
    return pyarrow.csv.read_csv(
        file,
        parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(columns, pa.string()), strings_can_be_null=False),
    )


READERS: dict[str, Callable[[Path], Any]] = {
    ".parquet": pq.read_table,
    ".csv": lambda file: _read_delimited(file, ","),
    ".tsv": lambda file: _read_delimited(file, "\t"),
    ".jsonl": pyarrow.json.read_json,
}


def check_tasks(tasks: Sequence[str], known: Sequence[str]) -> None:
    """Raise ``InputError`` unless ``tasks`` is a list of known tasks without repetitions."""
    if isinstance(tasks, str) or not tasks or len(set(tasks)) < len(tasks):
        raise InputError(f"`tasks`={tasks}: a list without repetitions, of {', '.join(known)}.")
    for task in tasks:
        if task not in known:
            simple = {name.replace("-", ""): name for name in known}
            near = difflib.get_close_matches(str(task).upper().replace("-", ""), simple, 1)
            hint = f" Did you mean {simple[near[0]]}?" if near else ""
            raise InputError(f"`tasks` has {task}: there are {', '.join(known)}.{hint}")


def _rows_by_task(
    path: str | Path, columns: Sequence[str], tasks: Sequence[str], splits: Sequence[str] | None, accepted: str = ""
) -> dict[str, Any]:
    """The rows of each task that has some, in ``splits`` if given: their cells, and their numbers in the table from 1.

    Tasks that the table lacks are left out with a warning. Raises ``InputError`` where there is none.
    """
    accepted = f"a .parquet, .csv, .tsv or .jsonl file with the columns {', '.join(columns)}{accepted}"
    table = read_table(path, "path", columns, accepted)
    cells = {name: np.array(table[name].to_pylist(), dtype=object) for name in columns}
    chosen = np.isin(cells["split"].astype(str), splits) if splits else np.ones(len(table), dtype=np.bool_)
    rows = {task: np.flatnonzero(chosen & (cells["task"] == task)) for task in tasks}
    missing, what = ", ".join(task for task in tasks if not len(rows[task])), f"{splits[0]} pairs" if splits else "rows"
    if not any(map(len, rows.values())):
        has = sorted({f"{t} {s}" for t, s in zip(cells["task"], cells["split"], strict=True)})
        raise InputError(
            f"`path`={path} has no {what} of {missing}. It holds: {', '.join(has[:12]) or 'no rows'}. "
            f"Change `tasks`{', `split`' if splits else ''} or `path`."
        )
    if missing:
        warn_once(f"{path} has no {what} of {missing}: left out, also of the average.")
    return {task: ({name: c[r] for name, c in cells.items()}, r + 1) for task, r in rows.items() if len(r)}


def _sentence(cell: Any, column: str, where: str) -> str:
    """White space is normalized; nothing is cut."""
    if not isinstance(cell, str) or not cell.strip():
        got = "empty" if cell is None or isinstance(cell, str) else f"{cell!r}"
        raise InputError(f"{where}: {column} is {got}, a sentence is needed. Correct or remove the row.")
    return " ".join(cell.split())


# The hub's copies do not say which subset a pair is from.
HUB = {f"STS{year}": f"mteb/sts{year}-sts" for year in range(12, 17)}
HUB |= {"STS-B": "mteb/stsbenchmark-sts", "SICK-R": "mteb/sickr-sts"}
STS_TASKS = tuple(HUB)
UNDIVIDED = ("STS-B", "SICK-R")  # scored as a whole, whatever subsets the data names
STS_SPLITS = {"test": ("test",), "dev": ("dev", "trial", "validation")}  # SICK's dev split is "trial", the hub's "validation"


@dataclass(frozen=True)
class STSPairs:
    """N pairs of a task: ``gold (N,)`` and ``subset (N,)``, which is None where the data does not name subsets."""

    first: Sequence[str]
    second: Sequence[str]
    gold: npt.NDArray[np.float64]
    subset: npt.NDArray[np.str_] | None


def read_sts(path: str | Path, tasks: Sequence[str], split: str) -> dict[str, STSPairs]:
    """Read the pairs of each task that is there; ``path`` is a table's, or "hub".

    Pairs without a gold score are left out with a warning, as SentEval leaves them out; so are tasks that a table lacks.
    ``InputError`` where the data cannot be read, has a bad row in these tasks, or none of the tasks.
    """
    if path == "hub":
        return {task: _sts_pairs(path, task, *_load_hub(task, split)) for task in tasks}
    rows = _rows_by_task(path, STS_COLUMNS, tasks, STS_SPLITS[split], ", or hub")
    return {task: _sts_pairs(path, task, *part) for task, part in rows.items()}


def _load_hub(task: str, split: str) -> tuple[Mapping[str, Any], Iterable[int]]:
    import datasets

    name, part = HUB[task], "validation" if split == "dev" else split
    try:
        rows = datasets.load_dataset(name, split=part)
        cells = {column: list(rows[column]) for column in ("sentence1", "sentence2", "score")}
    except Exception as error:  # the libraries below raise dozens of kinds
        raise InputError(
            f"`path`=hub: {name}, split {part}, cannot be loaded ({' '.join(str(error).split())}). "
            f"Set `path` to a table with the columns {', '.join(STS_COLUMNS)}, or leave {task} out of `tasks`."
        ) from error
    return cells, range(1, len(rows) + 1)


def _sts_pairs(path: str | Path, task: str, cells: Mapping[str, Any], numbers: Iterable[int]) -> STSPairs:
    """Check and convert the rows of a task; ``numbers`` are those of the rows in the data, from 1."""
    name = f"hub ({HUB[task]})" if path == "hub" else str(path)
    divided = task not in UNDIVIDED and "subset" in cells
    subsets = cells.get("subset", [None] * len(cells["score"]))
    first, second, gold, subset = [], [], [], []
    columns = (numbers, cells["sentence1"], cells["sentence2"], cells["score"], subsets)
    for number, one, other, score, part in zip(*columns, strict=True):
        where = f"`path`={name}, row {number} ({task})"
        value = _gold_score(score, where)
        if np.isnan(value):
            continue
        if divided and not part:
            raise InputError(f"{where}: the subset is empty. {task} is scored by subset: correct the row.")
        first.append(_sentence(one, "sentence1", where))
        second.append(_sentence(other, "sentence2", where))
        gold.append(value)
        subset.append(str(part) if divided else task)
    if dropped := len(cells["score"]) - len(gold):
        warn_once(f"{name}: {dropped} of {len(cells['score'])} pairs of {task} have no gold score and are left out.")
    known = divided or task in UNDIVIDED
    pairs = STSPairs(first, second, np.array(gold, np.float64), np.array(subset, dtype=np.str_) if known else None)
    _check_gold(pairs, f"`path`={name}, {task}")
    return pairs


def _gold_score(score: Any, where: str) -> float:
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


def _check_gold(pairs: STSPairs, where: str) -> None:
    """There is no correlation with a constant: that is an error of the data, no model can score on it."""
    subset = np.zeros(len(pairs.gold), dtype=np.str_) if pairs.subset is None else pairs.subset
    for name in np.unique(subset) if len(subset) else [""]:
        if len(set(pairs.gold[subset == name])) < 2:
            raise InputError(
                f"{where}{f', subset {name}' if name else ''}: fewer than two different gold scores; there is nothing to "
                "correlate with. Correct the data or leave the task out of `tasks`."
            )


# The splits of each task in SentEval's protocol; "all" is split by cross-validation.
TRANSFER_SPLITS: dict[str, tuple[str, ...]] = dict.fromkeys(("MR", "CR", "SUBJ", "MPQA"), ("all",))
TRANSFER_SPLITS |= {"SST2": ("train", "dev", "test"), "TREC": ("train", "test"), "MRPC": ("train", "test")}
TRANSFER_TASKS = tuple(TRANSFER_SPLITS)
PAIR_TASKS = ("MRPC",)


@dataclass(frozen=True)
class LabeledSentences:
    """N rows of a task: ``label (N,)`` from 0, ``split (N,)``; ``second`` is None where a row is one sentence."""

    first: Sequence[str]
    second: Sequence[str] | None
    label: Tensor
    split: npt.NDArray[np.str_]


def read_transfer(path: str | Path, tasks: Sequence[str]) -> dict[str, LabeledSentences]:
    """Read the rows of each task that the table has, as ``read_sts`` does."""
    rows = _rows_by_task(path, TRANSFER_COLUMNS, tasks, None)
    return {task: _labeled_sentences(path, task, *part) for task, part in rows.items()}


def _labeled_sentences(path: str | Path, task: str, cells: Mapping[str, Any], numbers: Iterable[int]) -> LabeledSentences:
    where = [f"`path`={path}, row {number} ({task})" for number in numbers]
    splits = TRANSFER_SPLITS[task]
    for row, split in zip(where, cells["split"], strict=True):
        if split not in splits:
            raise InputError(f"{row}: the split is {split!r}; {task} has {', '.join(splits)}. Correct or remove the row.")
    if lacking := [split for split in splits if split not in cells["split"]]:
        raise InputError(f"`path`={path} has no {lacking[0]} rows of {task}. Add them, or leave {task} out of `tasks`.")
    label = np.array([str(value) if value is not None else "" for value in cells["label"]])
    if (label == "").any():
        raise InputError(f"{where[int((label == '').argmax())]}: there is no label. Correct or remove the row.")
    names, number = np.unique(label, return_inverse=True)
    if len(names) < 2:
        raise InputError(f"`path`={path}, {task}: every label is {names[0]}; there is nothing to tell apart.")
    first, *second = (
        [_sentence(cell, side, row) for cell, row in zip(cells[side], where, strict=True)]
        for side in (("sentence1", "sentence2") if task in PAIR_TASKS else ("sentence1",))
    )
    return LabeledSentences(first, second[0] if second else None, torch.from_numpy(number), cells["split"].astype(str))
