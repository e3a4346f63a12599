"""Choose columns, check and convert their cells."""

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetInfo, Features
from datasets.table import InMemoryTable

from tercet.errors import InputError

# The usual names of pairs and triplets: SimCSE's and those of Sentence Transformers; then of single texts.
TUPLES = (("sent0", "sent1", "hard_neg"), ("anchor", "positive", "negative"))
SINGLES = ("text", "sentence")


class Chunk(NamedTuple):
    """Some rows of a file, which ``name`` describes for messages.

    ``number (N,)`` counts lines or rows of the file from 1, as ``unit`` says. ``not_text (N,)`` marks rows of JSON in which a
    text cell is no string. ``blank`` lines were skipped.
    """

    name: str
    unit: str
    number: pa.Array
    table: pa.Table
    not_text: pa.Array | None = None
    blank: int = 0

    def filter(self, keep: Any) -> "Chunk":
        """The rows where ``keep (N,)`` is true."""
        not_text = None if self.not_text is None else self.not_text.filter(keep)
        return self._replace(number=self.number.filter(keep), table=self.table.filter(keep), not_text=not_text)


def unreadable(name: str, what: str) -> InputError:
    """The error for a file, on one line."""
    return InputError(f"{name}: {' '.join(what.split())}")


def as_dataset(table: pa.Table, fingerprint: str, features: Mapping[str, Any] | None = None) -> Dataset:
    """A table in memory as a ``datasets.Dataset``."""
    info = DatasetInfo(features=Features(features)) if features else None
    return Dataset(InMemoryTable(table), info=info, fingerprint=fingerprint)


def text_columns(path: str, available: Sequence[str], columns: Sequence[str]) -> tuple[str, ...]:
    """The named columns; none: a pair or triplet under its usual names, the only column, ``text`` or ``sentence``."""
    if len(set(columns)) < len(columns):
        raise InputError(f"`columns`=[{', '.join(columns)}]: name one column or more, none of them twice.")
    if not available:
        raise InputError(f"`path`={path} has no rows.")
    if columns:
        return tuple(check_column(f"`path`={path}", available, name, "columns") for name in columns)
    for names in TUPLES:
        found = tuple(name for name in names if name in available)
        if found[:2] == names[:2]:
            return found
    for name in SINGLES if len(available) > 1 else available:
        if name in available:
            return (name,)
    raise InputError(
        f"`path`={path} has the columns {', '.join(available)}: say which hold text, for example `columns`=[{available[0]}]."
    )


def check_column(where: str, available: Sequence[str], name: str, parameter: str) -> str:
    """The name, if there is such a column; ``parameter`` is the one that named it, ``where`` the file."""
    if name in available:
        return name
    lower = {column.lower(): column for column in available}
    close = difflib.get_close_matches(name.lower(), lower, n=1)
    hint = f" Did you mean '{lower[close[0]]}'?" if close else ""
    raise InputError(f"`{parameter}` names '{name}', but {where} has the columns {', '.join(available)}.{hint}")


def drop_bad_rows(chunk: Chunk, texts: Sequence[str], bad_rows: str, max_characters: int, dropped: "Counter[str]") -> pa.Table:
    """The chunk's table, its texts stripped, without rows whose text is empty, too long or none; counts these by reason.

    Raises:
        InputError: a row is bad and ``bad_rows`` is "error", or a whole column is no text.
    """
    table, faults = chunk.table, [] if chunk.not_text is None else [("a text cell", "not text", chunk.not_text)]
    for name in texts:
        column = _plain(table[name])
        if not (pa.types.is_string(column.type) or pa.types.is_null(column.type)):
            message = f"column '{name}' holds {column.type}, not text. Name a text column in `columns`."
            raise unreadable(chunk.name, message)
        column = pc.utf8_trim_whitespace(column.cast(pa.string()))
        table = table.set_column(table.column_names.index(name), name, column)
        column = pc.fill_null(column, "")
        faults.append((f"column '{name}'", "empty text", pc.equal(column, "")))
        faults.append((f"column '{name}'", "with NUL characters", pc.match_substring(column, "\0")))
        long = pc.greater(pc.utf8_length(column), max_characters)
        faults.append((f"column '{name}'", f"longer than {max_characters} characters", long))
    faults = [fault for fault in faults if pc.any(fault[2]).as_py()]
    if faults and bad_rows == "error":
        raise unreadable(chunk.name, _describe_first(chunk, faults))
    keep = pa.array([True] * len(table))
    for _, reason, mask in faults:
        new = pc.and_(mask, keep)
        keep = pc.and_not(keep, mask)
        dropped[reason] += pc.sum(new).as_py()
    return table.filter(keep) if faults else table


def _describe_first(chunk: Chunk, faults: Sequence[tuple[str, str, Any]]) -> str:
    """The first bad row; of its faults the first."""
    row, (cell, reason, _) = min(((pc.index(fault[2], True).as_py(), fault) for fault in faults), key=lambda found: found[0])
    names = {"empty text": "empty", "with NUL characters": "text with a NUL character (maybe the file was UTF-16)"}
    hint = " (or raise `max_characters`)" if reason.startswith("longer") else ""
    return (
        f"{chunk.unit} {chunk.number[row].as_py()}: {cell} is {names.get(reason, reason)}{hint}. "
        "Mend the row, or drop such rows with `bad_rows`=drop"
    )


def label_ids(column: Any, path: str, name: str) -> tuple[pa.Array, list[str]]:
    """Each value's position among the sorted values, as int64, and those values; null and "" become -1.

    Strings that are all whole numbers are sorted as numbers.

    Raises:
        InputError: the values are fractions, or neither text nor numbers.
    """
    column = _plain(column)
    if pa.types.is_string(column.type):
        column = pc.utf8_trim_whitespace(column)
        column = pc.if_else(pc.equal(column, ""), None, column)
        column = column if (numbers := _try_cast(column)) is None else numbers
    elif pa.types.is_floating(column.type) or pa.types.is_boolean(column.type) or pa.types.is_null(column.type):
        column = to_integers(column, path, name, "label")
    if not (pa.types.is_integer(column.type) or pa.types.is_string(column.type)):
        raise InputError(f"`label`={name}: `path`={path} holds {column.type} there; labels are text or integers.")
    values = pc.unique(column).drop_null()
    values = values.take(pc.sort_indices(values))
    return pc.fill_null(pc.index_in(column, values), -1).cast(pa.int64()), [str(value) for value in values.to_pylist()]


def to_integers(column: Any, path: str, name: str, parameter: str) -> Any:
    """The column as int64; raises ``InputError`` with the first value that is no whole number."""
    column = _plain(column)
    numbers = _try_cast(column)
    if numbers is None:
        example = next(x for x in column.to_pylist() if x is not None and _try_cast(pa.array([x], column.type)) is None)
        raise InputError(f"`{parameter}`={name}: `path`={path} holds {example!r} there; whole numbers are accepted.")
    return numbers


def matches_any(column: Any, values: Sequence[Any], path: str, name: str) -> Any:
    """True where the column has one of the values, which may be written as text."""
    column = _plain(column)
    try:
        accepted = pa.array([None if value is None else str(value) for value in values], pa.string()).cast(column.type)
    except pa.ArrowException as error:
        raise InputError(f"`where`={{{name}: {values}}}: `path`={path} holds {column.type} there.") from error
    return pc.is_in(column, value_set=accepted)


def _plain(column: Any) -> Any:
    """One array, without dictionary; a column of strings as ``string``."""
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    column = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
    return column.cast(pa.string()) if pa.types.is_large_string(column.type) else column


def _try_cast(column: Any) -> Any:
    try:
        return column.cast(pa.int64())
    except pa.ArrowException:
        return None
