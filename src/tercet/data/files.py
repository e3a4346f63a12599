"""Rows of text in files or on the hub."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from itertools import chain
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, DatasetInfo, Features, IterableDataset, Value
from datasets.table import InMemoryTable

from tercet.data.cells import Tally, checked
from tercet.data.choice import known, text_columns
from tercet.data.fingerprint import place_print, text_print
from tercet.data.held_out import held_out_rows
from tercet.data.numbers import kept, label_ids, whole
from tercet.data.piece import Piece
from tercet.data.place import find
from tercet.data.read import column_names, pieces
from tercet.error import InputError

CHOICES = {"split": ("train", "test", "all"), "bad_rows": ("error", "drop")}


@dataclass(frozen=True)
class Files:
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
        available = column_names(find(self.path))
        columns = text_columns(self.path, available, [str(name) for name in self.columns or ()] or None)
        if taken := {"label", "position"} & set(columns):
            raise InputError(f"data.columns: a text column may not be called {', '.join(taken)}. Rename it.")
        for key in ("label", "position", "held_out_by"):
            if getattr(self, key) is not None:
                known(self.path, available, getattr(self, key), f"data.{key}")
        keep = {
            known(self.path, available, str(name), "data.where"): value for name, value in (self.where or {}).items()
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
        options = (*astuple(self)[1:], self.path if not find(self.path).files else "")
        return text_print(repr(options), place_print(find(self.path), whole=not self.streaming))

    def _others(self) -> list[str]:
        named = (self.label, self.position, self.held_out_by, *(self.where or ()))
        return list(dict.fromkeys(name for name in named if name is not None))

    def _pieces(self) -> Iterator[Piece]:
        """Kept, checked and stripped; at the end says what was dropped."""
        tally = Tally()
        for piece in pieces(find(self.path), self.columns, self._others(), self.streaming):
            for name, values in (self.where or {}).items():
                piece = piece.filter(kept(piece.table[name], values, self.path, name))
            yield checked(piece, self.columns, self.bad_rows, self.max_characters, tally)
        tally.say(self.path)
        if tally.rows == 0:
            left = f"data.where={self.where} keeps no row of data.path={self.path}." if self.where else ""
            raise InputError(left or f"data.path={self.path} has no rows.")
        if tally.rows == tally.dropped.total():
            raise InputError(
                f"data.path={self.path}: all {tally.rows} rows were bad and dropped. Is it the right file?"
            )

    def _finished(self, table: pa.Table) -> tuple[pa.Table, list[str]]:
        cells, names = {name: table[name] for name in self.columns}, list[str]()
        if self.label is not None and self.streaming:
            cells["label"] = _stream_labels(table[self.label], self.path, self.label)
        elif self.label is not None:
            cells["label"], names = label_ids(table[self.label], self.path, self.label)
        if self.position is not None:
            cells["position"] = pc.fill_null(whole(table[self.position], self.path, self.position, "data.position"), -1)
        return pa.table(cells), names

    def _features(self, names: Sequence[str] = ()) -> Features:
        numbers = {name: Value("int64") for name in ("label", "position") if getattr(self, name) is not None}
        named = {"label": ClassLabel(names=list(names))} if names else {}
        return Features({name: Value("string") for name in self.columns} | numbers | named)


def _stream(files: Files) -> Iterator[dict[str, Any]]:
    rows = chain.from_iterable(files._finished(piece.table)[0].to_pylist() for piece in files._pieces())
    for number, row in enumerate(rows):
        if files.split == "all" or (number < files.held_out) == (files.split == "test"):
            yield row
        elif files.split == "test":
            return


def _stream_labels(column: Any, path: str, name: str) -> Any:
    """A stream's values cannot be sorted: they must be numbers already."""
    try:
        return pc.fill_null(whole(column, path, name, "data.label"), -1)
    except InputError as error:
        raise InputError(f"{error} With data.streaming=false words are numbered.") from error


def listed(value: Any) -> list[Any]:
    """A value of ``where``, alone or in a list."""
    return [value] if value is None or isinstance(value, str | int | float | bool) else list(value)
