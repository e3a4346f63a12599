"""Some rows as they were read, before any check."""

from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from tercet.error import InputError

ROWS = 65_536  # per piece: enough to make the work per row vanish, few enough to stream


@dataclass(frozen=True)
class Piece:
    """A table with where it came from.

    ``number (N,)`` counts lines or rows (``unit``) of the file from 1; ``odd`` marks rows with a text cell that is no
    string, for readers whose cells have no common type. ``blank`` counts blank lines that were skipped.
    """

    place: str
    unit: str
    number: pa.Array
    table: pa.Table
    odd: pa.Array | None = None
    blank: int = 0

    def filter(self, keep: Any) -> "Piece":
        """The rows where ``keep (N,)`` is true."""
        odd = None if self.odd is None else self.odd.filter(keep)
        return replace(self, number=self.number.filter(keep), table=self.table.filter(keep), odd=odd)


def broken(place: str, what: str) -> InputError:
    """A file that cannot be read, as said to the user: on one line, whatever the library below said."""
    return InputError(f"{place}: {' '.join(what.split())}")
