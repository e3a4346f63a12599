"""Members of the same group as pairs: captions of one picture, questions of one intent."""

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from datasets import Dataset
from datasets.table import InMemoryTable

from tercet.data.files import Files
from tercet.data.fingerprint import text_print
from tercet.error import InputError
from tercet.notice import say_once


@dataclass(frozen=True)
class Groups:
    """Rows of ``files`` with the same value of the column ``group``, paired in order: 1-2, 3-4, ...

    A group of odd size leaves its last row out, a group of one is left out (counted and said). ``label`` is the
    group's number, so that others of the group are never negatives. Whole groups are held out.

    Raises:
        InputError: ``files`` is a stream, has more than one text column, or no group has two rows.
    """

    files: Files
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
        return text_print("groups-1", self.group, self.files.fingerprint())

    def _say(self, nameless: int, single: int, pairs: int) -> None:
        path = self.files.path
        if pairs == 0:
            raise InputError(
                f"data.path={path}: no two rows share a value of '{self.group}'. Name another column in data.group."
            )
        if nameless or single:
            say_once(
                f"data.path={path}: {single} groups of one row and {nameless} rows without '{self.group}' left out."
            )
