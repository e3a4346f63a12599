"""Choose, validate and convert columns."""

import difflib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from tercet.errors import InputError
from tercet.messages import warn_once


@dataclass(frozen=True)
class Chunk:
    """A table with where it came from.

    ``number (N,)`` counts lines or rows (``unit``) of the file from 1; ``odd`` marks rows with a text cell that is no
    string, for readers whose cells have no common type. ``blank`` counts blank lines that were skipped.
    """

    source: str
    unit: str
    number: pa.Array
    table: pa.Table
    not_text: pa.Array | None = None
    blank: int = 0

    def filter(self, keep: Any) -> "Chunk":
        """The rows where ``keep (N,)`` is true."""
        odd = None if self.not_text is None else self.not_text.filter(keep)
        return replace(self, number=self.number.filter(keep), table=self.table.filter(keep), not_text=odd)


def unreadable(place: str, what: str) -> InputError:
    """A file that cannot be read, as said to the user: on one line, whatever the library below said."""
    return InputError(f"{place}: {' '.join(what.split())}")


# SimCSE's names for pairs and triplets, and Sentence Transformers'.
TUPLES = (("sent0", "sent1", "hard_neg"), ("anchor", "positive", "negative"))
SINGLES = ("text", "sentence")


def text_columns(path: str, available: Sequence[str], asked: Sequence[str] | None) -> tuple[str, ...]:
    """``asked`` if given; else a pair or triplet under its usual names, the only column, ``text`` or ``sentence``."""
    if asked is not None:
        return _asked(path, available, asked)
    for names in TUPLES:
        found = tuple(name for name in names if name in available)
        if found[:2] == names[:2]:
            return found
    if len(available) == 1:
        return (available[0],)
    for name in SINGLES:
        if name in available:
            return (name,)
    raise InputError(
        f"data.path={path} has the columns {', '.join(available)}: say which hold text, "
        f"for example data.columns=[{available[0]}]."
    )


def check_column(path: str, available: Sequence[str], name: str, key: str) -> str:
    """The column ``name``, if there is one; ``key`` is the configuration key that named it."""
    if name in available:
        return name
    lower = {column.lower(): column for column in available}
    close = difflib.get_close_matches(name.lower(), lower, n=1)
    hint = f" Did you mean '{lower[close[0]]}'?" if close else ""
    raise InputError(f"{key} names '{name}', but data.path={path} has the columns {', '.join(available)}.{hint}")


def _asked(path: str, available: Sequence[str], asked: Sequence[str]) -> tuple[str, ...]:
    if not asked or len(set(asked)) < len(asked):
        raise InputError(f"data.columns=[{', '.join(asked)}]: name one column or more, none of them twice.")
    return tuple(check_column(path, available, name, "data.columns") for name in asked)


def label_ids(column: Any, path: str, name: str) -> tuple[pa.Array, list[str]]:
    """Each value's place among the sorted values, as int64, and those values; null and "" become -1.

    Strings that are all whole numbers are sorted as numbers.

    Raises:
        InputError: the values are fractions, or neither text nor numbers.
    """
    column = _plain(column)
    if pa.types.is_string(column.type):
        column = pc.utf8_trim_whitespace(column)
        column = pc.if_else(pc.equal(column, ""), None, column)
        column = _try_cast(column, pa.int64()) or column
    elif pa.types.is_floating(column.type):
        column = to_integers(column, path, name, "data.label")
    elif pa.types.is_boolean(column.type) or pa.types.is_null(column.type):
        column = column.cast(pa.int64())
    if not (pa.types.is_integer(column.type) or pa.types.is_string(column.type)):
        raise InputError(f"data.label={name}: data.path={path} holds {column.type} there; labels are text or integers.")
    values = pc.unique(column).drop_null()
    values = values.take(pc.sort_indices(values))
    return pc.fill_null(pc.index_in(column, values), -1).cast(pa.int64()), [str(value) for value in values.to_pylist()]


def to_integers(column: Any, path: str, name: str, key: str) -> Any:
    """The column as int64, null as -1 where ``key`` is not the label's.

    Raises:
        InputError: a value is no whole number.
    """
    column = _plain(column)
    found = _try_cast(column, pa.int64())
    if found is None:
        example = next(value for value in column.to_pylist() if not _is_whole(value))
        raise InputError(f"{key}={name}: data.path={path} holds {example!r} there; whole numbers are accepted.")
    return found


def matches_any(column: Any, values: list[Any], path: str, name: str) -> Any:
    """True where the column has one of the values, which may be written as text."""
    column = _plain(column)
    try:
        wanted = pa.array([None if value is None else str(value) for value in values], pa.string()).cast(column.type)
    except pa.ArrowException as error:
        raise InputError(f"data.where={{{name}: {values}}}: data.path={path} holds {column.type} there.") from error
    return pc.is_in(column, value_set=wanted)


def _plain(column: Any) -> Any:
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(pa.string()) if pa.types.is_large_string(column.type) else column


def _try_cast(column: Any, to: pa.DataType) -> Any:
    try:
        return column.cast(to)
    except pa.ArrowInvalid:
        return None


def _is_whole(value: Any) -> bool:
    try:
        return value is None or float(value).is_integer()
    except (TypeError, ValueError):
        return False


DROP = "or drop such rows with data.bad_rows=drop"


@dataclass
class RowCounts:
    """What a pass over the rows met."""

    rows: int = 0
    blank: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def say(self, path: str) -> None:
        """Warn, once a process for the same path and counts."""
        if self.blank:
            warn_once(f"data.path={path}: {self.blank} blank lines skipped.")
        if self.dropped:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items())
            warn_once(f"data.path={path}: {self.dropped.total()} of {self.rows} rows dropped ({reasons}).")


def validate(piece: Chunk, texts: Sequence[str], bad_rows: str, max_characters: int, tally: RowCounts) -> Chunk:
    """The piece with its text columns stripped and its bad rows dropped.

    Raises:
        InputError: a row is bad and ``bad_rows`` is "error", or a whole column is no text.
    """
    table = piece.table
    for name in texts:
        table = table.set_column(table.column_names.index(name), name, _stripped(piece, name))
    piece = replace(piece, table=table)
    tally.rows += len(table)
    tally.blank += piece.blank
    return _without(piece, _faults(piece, texts, max_characters), bad_rows, tally)


def _stripped(piece: Chunk, name: str) -> Any:
    column = piece.table[name]
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
        raise unreadable(piece.source, f"column '{name}' holds {kind}, not text. Name a text column in data.columns.")
    return pc.utf8_trim_whitespace(column.cast(pa.string()))


def _faults(piece: Chunk, texts: Sequence[str], max_characters: int) -> list[tuple[str, str, Any]]:
    """``(column, reason, mask)`` of what is wrong anywhere in the piece."""
    found = [] if piece.not_text is None else [("", "not text", piece.not_text)]
    for name in texts:
        column = piece.table[name]
        found.append((name, "empty text", pc.equal(pc.fill_null(column, ""), "")))
        found.append((name, "with NUL characters", pc.fill_null(pc.match_substring(column, "\0"), False)))
        long = pc.greater(pc.utf8_length(column), max_characters)
        found.append((name, f"longer than {max_characters} characters", pc.fill_null(long, False)))
    return [fault for fault in found if pc.any(fault[2]).as_py()]


def _without(piece: Chunk, faults: list[tuple[str, str, Any]], bad_rows: str, tally: RowCounts) -> Chunk:
    if not faults:
        return piece
    if bad_rows == "error":
        # The first bad row; of its faults the first in the list.
        first = [pc.index(mask, True).as_py() for _, _, mask in faults]
        row = min(first)
        column, reason, _ = faults[first.index(row)]
        raise unreadable(piece.source, _sentence(piece, row, column, reason))
    bad = pa.array([False] * len(piece.table))
    for _, reason, mask in faults:
        new = pc.and_not(mask, bad)
        bad = pc.or_(bad, new)
        tally.dropped[reason] += pc.sum(new).as_py() or 0
    return piece.filter(pc.invert(bad))


def _sentence(piece: Chunk, row: int, column: str, reason: str) -> str:
    where = f"{piece.unit} {piece.number[row].as_py()}"
    of = f"column '{column}' is" if column else "a text cell is"
    said = {"empty text": "empty", "with NUL characters": "text with a NUL character (maybe the file was UTF-16)"}
    hint = " (or raise data.max_characters)" if reason.startswith("longer") else ""
    return f"{where}: {of} {said.get(reason, reason)}{hint}. Mend the row, {DROP}"
