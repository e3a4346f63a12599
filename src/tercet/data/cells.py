"""Is every text cell text? Checked by column, not by cell."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from tercet.data.piece import Piece, broken
from tercet.notice import say_once

DROP = "or drop such rows with data.bad_rows=drop"


@dataclass
class Tally:
    """What a pass over the rows met."""

    rows: int = 0
    blank: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def say(self, path: str) -> None:
        """Warn, once a process for the same path and counts."""
        if self.blank:
            say_once(f"data.path={path}: {self.blank} blank lines skipped.")
        if self.dropped:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items())
            say_once(f"data.path={path}: {self.dropped.total()} of {self.rows} rows dropped ({reasons}).")


def checked(piece: Piece, texts: Sequence[str], bad_rows: str, max_characters: int, tally: Tally) -> Piece:
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


def _stripped(piece: Piece, name: str) -> Any:
    column = piece.table[name]
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
        raise broken(piece.place, f"column '{name}' holds {kind}, not text. Name a text column in data.columns.")
    return pc.utf8_trim_whitespace(column.cast(pa.string()))


def _faults(piece: Piece, texts: Sequence[str], max_characters: int) -> list[tuple[str, str, Any]]:
    """``(column, reason, mask)`` of what is wrong anywhere in the piece."""
    found = [] if piece.odd is None else [("", "not text", piece.odd)]
    for name in texts:
        column = piece.table[name]
        found.append((name, "empty text", pc.equal(pc.fill_null(column, ""), "")))
        found.append((name, "with NUL characters", pc.fill_null(pc.match_substring(column, "\0"), False)))
        long = pc.greater(pc.utf8_length(column), max_characters)
        found.append((name, f"longer than {max_characters} characters", pc.fill_null(long, False)))
    return [fault for fault in found if pc.any(fault[2]).as_py()]


def _without(piece: Piece, faults: list[tuple[str, str, Any]], bad_rows: str, tally: Tally) -> Piece:
    if not faults:
        return piece
    if bad_rows == "error":
        # The first bad row; of its faults the first in the list.
        first = [pc.index(mask, True).as_py() for _, _, mask in faults]
        row = min(first)
        column, reason, _ = faults[first.index(row)]
        raise broken(piece.place, _sentence(piece, row, column, reason))
    bad = pa.array([False] * len(piece.table))
    for _, reason, mask in faults:
        new = pc.and_not(mask, bad)
        bad = pc.or_(bad, new)
        tally.dropped[reason] += pc.sum(new).as_py() or 0
    return piece.filter(pc.invert(bad))


def _sentence(piece: Piece, row: int, column: str, reason: str) -> str:
    where = f"{piece.unit} {piece.number[row].as_py()}"
    of = f"column '{column}' is" if column else "a text cell is"
    said = {"empty text": "empty", "with NUL characters": "text with a NUL character (maybe the file was UTF-16)"}
    hint = " (or raise data.max_characters)" if reason.startswith("longer") else ""
    return f"{where}: {of} {said.get(reason, reason)}{hint}. Mend the row, {DROP}"
