"""Rows of text in files or on the hub."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, DatasetInfo, Features, IterableDataset, Value
from datasets.table import InMemoryTable

from tercet.data.columns import (
    Chunk,
    RowCounts,
    check_column,
    label_ids,
    matches_any,
    text_columns,
    to_integers,
    validate,
)
from tercet.data.file_reader import column_names, read_chunks
from tercet.data.paths import resolve
from tercet.data.splits import files_fingerprint, held_out_rows, text_fingerprint
from tercet.errors import InputError
from tercet.messages import warn_once

CHOICES = {"split": ("train", "test", "all"), "bad_rows": ("error", "drop")}


@dataclass(frozen=True)
class TextFiles:
    """The text columns of a file, a folder of files of one kind, or a hub data set ``owner/name[:config[:split]]``.

    ``columns`` are the views in order; none or null: found by name, from the head of the file. ``label`` names a
    column that is numbered by its sorted values (-1 where empty), ``position`` a column of whole numbers. ``where``
    keeps rows by value: ``{split: train, source: [news, speech]}``.

    With ``held_out`` above 0, ``split`` "test" is that many rows (a fifth of all at most, 2 at least), chosen by a
    hash of the column ``held_out_by`` (null: the label where there is a position, so that documents stay whole, else
    the first text column), so that equal values are on one side; "train" is the others, "all" both. With ``streaming``
    the rows are read as they come, and the first ``held_out`` are the test side. A cell has at most
    ``max_characters``; rows with a bad cell are an "error" or "drop" as ``bad_rows`` says.

    Raises:
        InputError: here or in a method, for whatever cannot be used.
    """

    path: str
    columns: Sequence[str] = ()
    label: str | None = None
    position: str | None = None
    where: Mapping[str, Any] | None = None
    split: str = "all"
    held_out: int = 0
    held_out_by: str | None = None
    bad_rows: str = "error"
    max_characters: int = 100_000
    streaming: bool = False

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise InputError(f"data.{name}={getattr(self, name)}: use one of {', '.join(choices)}.")
        if self.split == "test" and self.held_out == 0:
            raise InputError("data.held_out=0 leaves no test side. Use data.held_out=2 or more.")
        if isinstance(self.columns, str):
            raise InputError(f"data.columns={self.columns}: a list is needed, data.columns=[{self.columns}].")
        available = column_names(resolve(self.path))
        columns = text_columns(self.path, available, [str(name) for name in self.columns or ()] or None)
        if taken := {"label", "position"} & set(columns):
            raise InputError(f"data.columns: a text column may not be called {', '.join(taken)}. Rename it.")
        for key in ("label", "position", "held_out_by"):
            if getattr(self, key) is not None:
                check_column(self.path, available, getattr(self, key), f"data.{key}")
        keep = {
            check_column(self.path, available, str(name), "data.where"): value for name, value in (self.where or {}).items()
        }
        object.__setattr__(self, "columns", columns)
        object.__setattr__(self, "where", {name: listed(value) for name, value in keep.items()})

    def __hash__(self) -> int:
        return hash((self.path, self.columns, self.split))

    def rows(self) -> Dataset | IterableDataset:
        """The side's rows: the text columns, then ``label`` and ``position`` if they are named."""
        if self.streaming and self.split == "test":  # few rows, and the same that the stream's train side leaves out
            return Dataset.from_list(list(_stream(self)), features=self._features())
        if self.streaming:
            return IterableDataset.from_generator(_stream, features=self._features(), gen_kwargs={"files": self})
        tables = [piece.table for piece in self._pieces()]
        try:
            table = pa.concat_tables(tables, promote_options="permissive")
        except pa.ArrowException as error:
            raise InputError(f"data.path={self.path}: the files' columns do not agree ({error}).") from error
        out, names = self._finished(table)
        if self.held_out and self.split != "all":
            document = self.label if self.position is not None else None  # sentences in order stay together
            by = table[self.held_out_by or document or self.columns[0]]
            test = held_out_rows(by, self.held_out, self.path)
            out = out.filter(pa.array(test if self.split == "test" else ~test))
        info = DatasetInfo(features=self._features(names))
        return Dataset(InMemoryTable(out), info=info, fingerprint=self.fingerprint())

    def fingerprint(self) -> str:
        """Hashes what the files hold (of a stream: their sizes and ends) and every option; not where they are."""
        options = (*astuple(self)[1:], self.path if not resolve(self.path).files else "")
        return text_fingerprint(repr(options), files_fingerprint(resolve(self.path), whole=not self.streaming))

    def _others(self) -> list[str]:
        named = (self.label, self.position, self.held_out_by, *(self.where or ()))
        return list(dict.fromkeys(name for name in named if name is not None))

    def _pieces(self) -> Iterator[Chunk]:
        """Kept, checked and stripped; at the end says what was dropped."""
        tally = RowCounts()
        for piece in read_chunks(resolve(self.path), self.columns, self._others(), self.streaming):
            for name, values in (self.where or {}).items():
                piece = piece.filter(matches_any(piece.table[name], values, self.path, name))
            yield validate(piece, self.columns, self.bad_rows, self.max_characters, tally)
        tally.say(self.path)
        if tally.rows == 0:
            left = f"data.where={self.where} keeps no row of data.path={self.path}." if self.where else ""
            raise InputError(left or f"data.path={self.path} has no rows.")
        if tally.rows == tally.dropped.total():
            raise InputError(f"data.path={self.path}: all {tally.rows} rows were bad and dropped. Is it the right file?")

    def _finished(self, table: pa.Table) -> tuple[pa.Table, list[str]]:
        cells, names = {name: table[name] for name in self.columns}, list[str]()
        if self.label is not None and self.streaming:
            cells["label"] = _stream_labels(table[self.label], self.path, self.label)
        elif self.label is not None:
            cells["label"], names = label_ids(table[self.label], self.path, self.label)
        if self.position is not None:
            cells["position"] = pc.fill_null(to_integers(table[self.position], self.path, self.position, "data.position"), -1)
        return pa.table(cells), names

    def _features(self, names: Sequence[str] = ()) -> Features:
        numbers = {name: Value("int64") for name in ("label", "position") if getattr(self, name) is not None}
        named = {"label": ClassLabel(names=list(names))} if names else {}
        return Features({name: Value("string") for name in self.columns} | numbers | named)


def _stream(files: TextFiles) -> Iterator[dict[str, Any]]:
    rows = chain.from_iterable(files._finished(piece.table)[0].to_pylist() for piece in files._pieces())
    for number, row in enumerate(rows):
        if files.split == "all" or (number < files.held_out) == (files.split == "test"):
            yield row
        elif files.split == "test":
            return


def _stream_labels(column: Any, path: str, name: str) -> Any:
    """A stream's values cannot be sorted: they must be numbers already."""
    try:
        return pc.fill_null(to_integers(column, path, name, "data.label"), -1)
    except InputError as error:
        raise InputError(f"{error} With data.streaming=false words are numbered.") from error


def listed(value: Any) -> list[Any]:
    """A value of ``where``, alone or in a list."""
    return [value] if value is None or isinstance(value, str | int | float | bool) else list(value)


@dataclass(frozen=True)
class Groups:
    """Rows of ``files`` with the same value of the column ``group``, paired in order: 1-2, 3-4, ...

    A group of odd size leaves its last row out, a group of one is left out (counted and said). ``label`` is the
    group's number, so that others of the group are never negatives. Whole groups are held out.

    Raises:
        InputError: ``files`` is a stream, has more than one text column, or no group has two rows.
    """

    files: TextFiles
    group: str

    def __post_init__(self) -> None:
        if self.files.streaming:
            raise InputError("data.streaming=true: groups are gathered over all rows. Use data.streaming=false.")
        if len(self.files.columns) != 1:
            raise InputError(
                f"data.columns=[{', '.join(self.files.columns)}]: groups pair the rows of one text column. Name one."
            )
        # Also checks that there is such a column.
        object.__setattr__(self, "files", replace(self.files, label=self.group, held_out_by=self.group))

    @property
    def columns(self) -> tuple[str, ...]:
        """Two members of a group."""
        return ("anchor", "positive")

    def rows(self) -> Dataset:
        """The pairs, by group."""
        table = self.files.rows().data.table.combine_chunks()
        label = table["label"].to_numpy()
        order = np.argsort(label, kind="stable")
        order = order[label[order] >= 0]  # an empty cell names no group
        group = label[order]
        start = np.flatnonzero(np.diff(group, prepend=-1))
        sizes = np.diff(start, append=len(group))
        place = np.arange(len(group)) - np.repeat(start, sizes)
        size = np.repeat(sizes, sizes)
        anchors = np.flatnonzero((place % 2 == 0) & (place + 1 < size))
        self._say(len(label) - len(order), int((sizes == 1).sum()), len(anchors))
        text = table[self.files.columns[0]]
        pairs = {"anchor": text.take(order[anchors]), "positive": text.take(order[anchors + 1])}
        out = pa.table(pairs | {"label": pa.array(group[anchors], pa.int64())})
        return Dataset(InMemoryTable(out), fingerprint=self.fingerprint())

    def fingerprint(self) -> str:
        """Follows the files' and the group."""
        return text_fingerprint("groups-1", self.group, self.files.fingerprint())

    def _say(self, nameless: int, single: int, pairs: int) -> None:
        path = self.files.path
        if pairs == 0:
            raise InputError(
                f"data.path={path}: no two rows share a value of '{self.group}'. Name another column in data.group."
            )
        if nameless or single:
            warn_once(f"data.path={path}: {single} groups of one row and {nameless} rows without '{self.group}' left out.")
