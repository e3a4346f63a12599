"""What evaluators share: embeddings from any encode function, rows of sources and of tables, groups of evaluators."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor

from tercet.errors import InputError, did_you_mean, require
from tercet.images import UnreadableImage, read_image_cell
from tercet.messages import warn_once
from tercet.paths import locate
from tercet.types import EncodeFunction, Evaluator, Item, Source

Rows = Source | Mapping[str, Sequence[Any]]  # a source, or columns by name
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Strings = npt.NDArray[np.str_]
TABLES = (".parquet", ".csv", ".tsv", ".jsonl")


def as_embeddings(encode: EncodeFunction, items: Sequence[Item], suite: str | None = None) -> Tensor:
    """Encode ``items``: ``(N, D)`` on the CPU, in float64 where ``encode`` returns float64, else in float32.

    ``InputError`` where that is no matrix of numbers, or, if ``suite`` is given to open that message, not finite.
    """
    found: Any = encode(items)
    try:
        z = found.detach().cpu() if isinstance(found, Tensor) else torch.from_numpy(np.array(found))
    except (TypeError, ValueError) as error:
        raise InputError(f"encode returned {type(found).__name__}: an array of numbers is needed ({error}).") from error
    if z.ndim != 2 or len(z) != len(items):
        raise InputError(f"encode returned shape {tuple(z.shape)} for {len(items)} items: (N, D) is needed.")
    z = z if z.dtype == torch.float64 else z.float()
    if suite is not None and (bad := int((~z.isfinite()).any(1).sum())):
        fault = f"{bad} of {len(z)} embeddings are not finite: the model has diverged, or overflows in half precision"
        raise InputError(f"{suite}: {fault}. Use another checkpoint or 32-bit precision.")
    return z


def embed_columns(encode: EncodeFunction, *columns: Sequence[Item]) -> list[Tensor]:
    """Encode the columns of pairs, ``(N, D)`` each; by one call, unless ``encode.for_column`` has prompts for each of them."""
    if has_one_prompt(encode, len(columns)):
        z = as_embeddings(encode, [item for column in columns for item in column])
        return list(z.split([len(column) for column in columns]))
    return [as_embeddings(encode.for_column(i), column) for i, column in enumerate(columns)]  # type: ignore[attr-defined]


def has_one_prompt(encode: EncodeFunction, num_columns: int = 2) -> bool:
    """Whether the texts of all columns are encoded alike."""
    of_column = getattr(encode, "for_column", lambda column: encode)
    return all(of_column(i) is encode for i in range(num_columns))


def encode_unit(encode: EncodeFunction, items: Sequence[Item], suite: str) -> Tensor:
    """Encode to unit vectors ``(N, D)`` in float64; a row of zeros stays 0. Raises ``InputError`` where one is not finite."""
    return F.normalize(as_embeddings(encode, items, suite).double(), dim=-1)


def encode_once(encode: EncodeFunction, texts: Sequence[str], suite: str | None = None) -> Callable[[Sequence[str]], Tensor]:
    """Encode each distinct text once; return a function from some of the texts to their embeddings."""
    row = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    z = as_embeddings(encode, list(row), suite)
    return lambda some: z[[row[text] for text in some]]


def join_parts(parts: Sequence[Any]) -> Floats:
    """Concatenate values by example, ``(n,)`` each, so scaled that their mean is the unweighted mean of the parts' means.

    >>> join_parts([[1, 0, 0], [1]])  # a mean of (1/3 + 1) / 2
    array([0.66666667, 0.        , 0.        , 2.        ])
    """
    count = sum(map(len, parts)) / len(parts)
    return np.concatenate([np.asarray(part, np.float64) * (count / len(part)) for part in parts])


def distinct(texts: Sequence[str]) -> tuple[list[str], list[int]]:
    """Return the distinct texts in order, and each row's index among them."""
    index = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    return list(index), [index[text] for text in texts]


def check_source(suite: str, name: str, source: object) -> None:
    """Raise ``InputError`` where there is nothing to read, or a name that metrics cannot carry."""
    require(name and "/" not in name, f"`name`={name!r}: metrics are called {suite}/<name>/..., so use a name without '/'.")
    fault = f"{suite} of {name} needs held-out rows, but `source` is not set: {name} has none"
    require(source is not None, f"{fault}. Use other data, or an evaluator with data of its own, such as STS.")


def check_ranks(ks: Sequence[int]) -> None:
    """Raise ``InputError`` unless ``ks`` is a list of ranks."""
    require(ks and all(type(k) is int and k >= 1 for k in ks), f"`ks`={ks}: a list of ranks from 1 on, as [1, 10].")


def read_rows(source: Rows) -> tuple[list[str], Any]:
    """The columns of texts or images, and all rows as a ``datasets.Dataset``."""
    if not isinstance(source, Mapping):
        return list(source.columns), source.rows()
    import datasets

    return [name for name in source if name not in ("label", "position")], datasets.Dataset.from_dict(dict(source))


def text_pairs(source: Rows, suite: str) -> tuple[list[str], list[str], list[int]]:
    """Read queries and documents, the first two columns, and labels (-1: none), row by row.

    Of a source of one column each text is cut at its middle word: the first half is the query, the second its document. That
    needs no label, and a better model finds more of them. Texts of fewer than 4 words are left out, with a warning.
    """
    columns, rows = read_rows(source)
    label = [int(x) for x in rows["label"]] if "label" in rows.column_names else [-1] * len(rows)
    advice = "Set `source.held_out` higher."
    if len(columns) > 1:
        first, second = list(rows[columns[0]]), list(rows[columns[1]])
    else:
        cut = [(w, len(w) // 2, x) for w, x in zip(map(str.split, rows[columns[0]]), label, strict=True) if len(w) >= 4]
        if short := len(rows) - len(cut):
            warn_once(f"{suite}: {short} of {len(rows)} held-out texts have fewer than 4 words and are left out.")
        if short and not cut:
            advice = "A text of one column is found by its halves, which takes 4 words: give two columns, or measure otherwise."
        first, second = [" ".join(w[:half]) for w, half, _ in cut], [" ".join(w[half:]) for w, half, _ in cut]
        label = [x for _, _, x in cut]
    require(len(first) > 1, f"{suite}: {len(first)} held-out pairs, but a search needs 2. {advice}")
    return first, second, label


@dataclass(frozen=True)
class LabeledItems:
    """N different texts or images and ``label (N,)``, -1 where there is none; ``names`` of the labels, if they have some."""

    items: Sequence[Item]
    label: Tensor
    names: Sequence[str] | None


def item_hash(item: Item) -> bytes:
    """A hash of the content."""
    return hashlib.blake2b(item.encode() if isinstance(item, str) else item, digest_size=16).digest()


def read_labeled_items(source: Rows, suite: str) -> LabeledItems:
    """Read the first column of the source; equal contents are one item, for a copy of the query is found by any model.

    A content with several labels counts as having none. ``suite`` opens messages, as "clustering of trec".
    """
    (column, *_), rows = read_rows(source)
    if "label" not in rows.column_names:
        advice = "Set `source.label`, or use Retrieval."
        raise InputError(f"{suite} needs labels, but the source has only the columns {', '.join(rows.column_names)}. {advice}")
    labels: dict[Item, set[int]] = {}
    for number, (cell, label) in enumerate(zip(rows[column], rows["label"], strict=True), start=1):
        item = cell if isinstance(cell, str) else read_image(cell, f"{suite}: the image of row {number}")
        labels.setdefault(item, set()).update({int(label)} if label is not None and label >= 0 else ())
    if copies := len(rows) - len(labels):
        warn_once(f"{suite}: {copies} of {len(rows)} items are copies of others and are left out.")
    if ambiguous := sum(len(found) > 1 for found in labels.values()):
        warn_once(f"{suite}: {ambiguous} items have several labels; they count as having none.")
    items = sorted(labels, key=item_hash)  # so that the order, which decides between ties, does not depend on labels
    label = torch.tensor([next(iter(labels[item])) if len(labels[item]) == 1 else -1 for item in items], dtype=torch.long)
    return LabeledItems(items, label, getattr(rows.features["label"], "names", None))


def read_image(cell: Any, image: str) -> bytes:
    """Read a cell of an image column; ``image`` names it in the ``InputError`` that is raised where that fails."""
    try:
        return read_image_cell(cell)
    except (OSError, TypeError, UnreadableImage) as error:
        raise InputError(f"{image} cannot be read: {error}") from error


def find_input(path: str | Path, parameter: str, accepted: str, suffixes: Iterable[str]) -> Path:
    """Locate a file with one of the ``suffixes``; raise ``InputError`` about ``parameter`` where there is none."""
    file = locate(str(path))
    if not file.is_file():
        what = "is a folder" if file.is_dir() else f"does not exist (looked for {file})"
        raise InputError(f"`{parameter}`={path} {what}. It takes {accepted}; relative paths also start in TERCET_DATA.")
    require(file.suffix.lower() in suffixes, f"`{parameter}`={path} ends in {file.suffix!r}. It takes {accepted}.")
    return file


def read_table(path: str | Path, parameter: str, columns: Sequence[str], accepted: str) -> dict[str, list[Any]]:
    """Read the cells of ``columns``, which must be there once each; cells of csv and tsv are text."""
    from tercet.data.data_path import DataPath  # imports datasets: a second
    from tercet.data.file_formats import FORMATS

    file = find_input(path, parameter, accepted, TABLES)
    data = DataPath(str(path), FORMATS[file.suffix.lower()], (file,))
    try:
        check_columns(data.schema().names, path, parameter, columns, accepted)
        tables = [chunk.table for chunk in data.chunks((), columns)]
        for column in (table.field(name) for table in tables for name in columns):
            fault = f"the column '{column.name}' holds {column.type}, where text or numbers are needed"
            require(not pa.types.is_nested(column.type), f"`{parameter}`={path}: {fault}.")
    except InputError as error:
        raise InputError(error.rename({"path": f"`{parameter}`", parameter: f"`{parameter}`"})) from error
    return {name: [cell for table in tables for cell in table[name].to_pylist()] for name in columns}


def check_columns(names: Sequence[str], path: str | Path, parameter: str, columns: Sequence[str], accepted: str) -> None:
    """Raise ``InputError`` unless each of ``columns`` is once among the ``names`` of a table's columns."""
    if lacking := [name for name in columns if names.count(name) != 1]:
        need = f"{', '.join(lacking)} must be there once. It takes {accepted}."
        raise InputError(f"`{parameter}`={path} has the columns {', '.join(names)}; {need}")


def check_tasks(tasks: Sequence[str], known: Sequence[str]) -> None:
    """Raise ``InputError`` unless ``tasks`` is a list of known tasks without repetitions."""
    if isinstance(tasks, str) or not tasks or len(set(tasks)) < len(tasks):
        raise InputError(f"`tasks`={tasks}: a list without repetitions, of {', '.join(known)}.")
    for task in tasks:
        require(task in known, f"`tasks` has {task}: there are {', '.join(known)}.{did_you_mean(task, known)}")


def read_tasks(
    path: str | Path, columns: Sequence[str], tasks: Sequence[str], splits: Sequence[str] = ()
) -> dict[str, list[dict[str, Any]]]:
    """Read each task's rows, of ``splits`` if given, without empty tasks: ``columns``, and ``where`` for messages."""
    accepted = f"SentEval's folder data/downstream{', hub' if splits else ''}, or a .parquet, .csv, .tsv or .jsonl file"
    table = read_table(path, "path", columns, f"{accepted} with the columns {', '.join(columns)}")
    rows = [dict(zip(columns, cells, strict=True)) for cells in zip(*table.values(), strict=True)]
    for number, row in enumerate(rows, start=1):
        row["where"] = f"`path`={path}, row {number} ({row['task']})"
    found: dict[str, list[dict[str, Any]]] = {task: [] for task in tasks}
    for row in rows:
        if row["task"] in found and (not splits or row["split"] in splits):
            found[row["task"]].append(row)
    missing, what = ", ".join(task for task in tasks if not found[task]), f"{splits[0]} pairs" if splits else "rows"
    if not any(found.values()):
        has = sorted({f"{row['task']} {row['split']}" for row in rows})
        advice = f"It holds: {', '.join(has[:12]) or 'no rows'}. Change `tasks`{', `split`' if splits else ''} or `path`."
        raise InputError(f"`path`={path} has no {what} of {missing}. {advice}")
    if missing:
        warn_once(f"{path} has no {what} of {missing}: left out, also of the average.")
    return {task: rows for task, rows in found.items() if rows}


def clean_sentence(cell: Any, column: str, where: str) -> str:
    """White space is normalized; nothing is cut."""
    if not isinstance(cell, str) or not cell.strip():
        got = "empty" if cell is None or isinstance(cell, str) else f"{cell!r}"
        raise InputError(f"{where}: {column} is {got}, a sentence is needed. Correct or remove the row.")
    return " ".join(cell.split())


@dataclass(frozen=True)
class EvaluatorGroup:
    """Runs the evaluators ``members`` and merges their metrics.

    >>> group = EvaluatorGroup({"length": lambda encode: {"length": float(len(encode(["a"])[0]))}})
    >>> group(lambda items: np.ones((len(items), 3)))
    {'length': 3.0}
    """

    members: Mapping[str, Evaluator]

    def __post_init__(self) -> None:
        for name, member in self.members.items():
            require(callable(member), f"`members.{name}`={member!r:.80}: an evaluator is needed.")

    def __call__(self, encode: EncodeFunction) -> dict[str, float]:
        """Return the metrics of all members. Raises ``InputError`` where two members use one name."""
        metrics: dict[str, float] = {}
        for name, evaluator in self.members.items():
            found = evaluator(encode)
            if twice := metrics.keys() & found.keys():
                raise InputError(f"`members.{name}` measures {', '.join(sorted(twice))} once more. Give it another name.")
            metrics |= found
        return metrics

    def table(self, metrics: Mapping[str, float]) -> str:
        """Format metrics, named as they were returned: the tables of the members that have one, then the other metrics."""
        tables = {name: table(metrics) for name, e in self.members.items() if (table := getattr(e, "table", None))}
        suites = tuple(f"{name}/" for name in tables)
        rest = [f"{name}  {value:.4f}" for name, value in metrics.items() if not name.startswith(suites)]
        return "\n\n".join(filter(None, [*tables.values(), "\n".join(rest)]))

    def examples(self, encode: EncodeFunction) -> dict[str, Any]:
        """The members' metrics by example, where they have some."""
        members = [getattr(evaluator, "examples", None) for evaluator in self.members.values()]
        return {name: values for examples in members if examples for name, values in examples(encode).items()}

    def figures(self, encode: EncodeFunction) -> dict[str, Any]:
        """Draw the matplotlib figures of the members that have some, named ``<member>_<figure>``."""
        figures = {name: draw(encode) for name, e in self.members.items() if (draw := getattr(e, "figures", None))}
        return {f"{name}_{key}": figure for name, found in figures.items() for key, figure in found.items()}
