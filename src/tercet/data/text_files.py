"""Rows of text in files or on the hub."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Features, IterableDataset, Value

from tercet.data import columns as cols
from tercet.data.data_path import DataPath, resolve
from tercet.errors import InputError, check_choice, require
from tercet.messages import warn_once


@dataclass(frozen=True)
class TextFiles:
    r"""The text columns of a file, a folder of files of one kind, or a hub data set ``owner/name[:config[:split]]``.

    ``columns`` are the views in order; none: found by their usual names. ``label`` names a column whose values are numbered
    (-1 where empty; texts are compared as they are: 007 is not 7), ``position`` a column of whole numbers. ``where`` keeps rows
    by value: ``{"split": "train", "source": ["news", "speech"]}``.

    A row of .txt and .tsv files is a line, and quotes are letters. In .csv files a cell in quotes may hold commas or line ends;
    one that holds both, or of a file of one column line ends, is an error, as is a quote that is not closed, since it could
    have taken up the rows after it. JSON and Parquet files hold any text.

    ``split`` names the rows to take: "train", "test" or "validation", or "all". With ``held_out`` above 0, the ``split``
    "test" has that many rows, at least 2 and at most a fifth, chosen by a hash of the column ``held_out_by`` (None: the
    label where there is a position, so that documents stay whole, else the first text column), so that equal values are in
    one split; "train" has the other rows, "all" both. With ``streaming`` rows are read when they are needed, and the first
    ``held_out`` are the test split. With ``validation_rows`` as many of the other rows, a fifth at most, are the ``split``
    "validation". ``bad_rows`` is "error" or "drop": what happens to rows with an empty cell, or one of more than
    ``max_characters``.

    >>> import pathlib, tempfile
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "pairs.csv"
    >>> _ = file.write_text("question,answer\nWho?,He.\nWhat?,This.\n")
    >>> TextFiles(str(file), ["question", "answer"]).rows()[1]
    {'question': 'What?', 'answer': 'This.'}
    """

    path: str
    columns: Sequence[str] = ()
    label: str | None = None
    position: str | None = None
    where: Mapping[str, Any] | None = field(default=None, hash=False)
    split: str = "all"
    held_out: int = 0
    held_out_by: str | None = None
    bad_rows: str = "error"
    max_characters: int = 100_000
    streaming: bool = False
    validation_rows: int = 0

    def __post_init__(self) -> None:
        cols.check_split(self.split, self.held_out, self.validation_rows)
        check_choice("bad_rows", self.bad_rows, ("error", "drop"))
        require(not isinstance(self.columns, str), f"`columns`={self.columns}: a list is needed, `columns`=[{self.columns}].")
        data = resolve(self.path)
        available = data.schema().names
        names = [str(name) for name in self.columns or ()]
        columns = cols.text_columns(self.path, available, names, lambda: _most_text(data, available))
        taken = ", ".join({"label", "position"} & set(columns))
        require(not taken, f"`columns`: a text column may not be called {taken}. Rename it.")
        for key in ("label", "position", "held_out_by"):
            if (name := getattr(self, key)) is not None:
                cols.check_column(f"`path`={self.path}", available, name, key)
        vars(self).update(columns=columns, where=cols.where_values(self.where, available, self.path))

    @property
    def provides(self) -> frozenset[str]:
        """What samplers, objectives and evaluators may need: "label", "position", "all_rows"."""
        given = {"label": self.label is not None, "position": self.position is not None, "all_rows": not self.streaming}
        return frozenset(name for name, is_given in given.items() if is_given)

    def rows(self) -> Dataset | IterableDataset:
        """The split's rows: the text columns, then ``label`` and ``position`` if they are named."""
        if self.streaming and self.split in ("test", "validation"):  # few rows; the train split leaves them out
            return Dataset.from_list(list(self._stream()), features=self._features())
        if self.streaming:
            return IterableDataset.from_generator(self._stream, features=self._features())
        tables = list(self._tables())
        try:
            table = pa.concat_tables(tables, promote_options="permissive")
        except pa.ArrowException as error:
            raise InputError(f"`path`={self.path}: the files' columns do not agree ({error}).") from error
        by = table[self.held_out_by or (self.label if self.position is not None else None) or self.columns[0]]
        cells, names = self._cells(table)
        rows = cols.split_rows(cells, by, self.split, self.held_out, self.path, self.validation_rows)
        return cols.as_dataset(rows, self.fingerprint(), self._features(names))

    def fingerprint(self) -> str:
        """Hash the files' contents (of a stream: at most a GiB of them) and every option but where the files are."""
        return resolve(self.path).fingerprint(astuple(self)[1:], whole=not self.streaming)

    def _tables(self) -> Iterator[pa.Table]:
        """The rows that ``where`` and ``bad_rows`` keep; warns of the others at the end."""
        count, blank, dropped = 0, 0, Counter[str]()
        others = [name for name in (self.label, self.position, self.held_out_by, *(self.where or ())) if name is not None]
        for chunk in resolve(self.path, self.streaming).chunks(self.columns, others):
            keep = cols.where_mask(chunk.table, self.where or {}, self.path)
            count, blank = count + int(keep.sum()), blank + chunk.blank
            yield self._drop_bad_rows(chunk, keep, dropped)
        if blank:
            warn_once(f"{self.path}: {blank} blank lines skipped.")
        if dropped:
            reasons = ", ".join(f"{number} {reason}" for reason, number in dropped.items())
            warn_once(f"{self.path}: {dropped.total()} of {count} rows dropped ({reasons}).")
        empty = f"`path`={self.path} has no rows."
        require(count, f"`where`={self.where} keeps no row of `path`={self.path}." if self.where else empty)
        require(count > dropped.total(), f"`path`={self.path}: all {count} rows were bad and dropped. Is it the right file?")

    def _drop_bad_rows(self, chunk: cols.Chunk, keep: Any, dropped: "Counter[str]") -> pa.Table:
        """The rows to ``keep``, their texts stripped, but those whose text is empty, too long or none, counted by reason."""
        hint = " (a cell is one text, no number and no list)"
        table, faults = chunk.table, [(f"column '{name}'", "not text", hint, mask) for name, mask in chunk.not_text]
        for name in self.columns:
            column, cell = table[name], f"column '{name}'"
            is_text = pa.types.is_string(column.type) or pa.types.is_null(column.type)
            require(is_text, f"{chunk.name}: {cell} holds {column.type}, not text. Name a text column in `columns`.")
            column = pc.utf8_trim_whitespace(column.cast(pa.string()))
            table = table.set_column(table.column_names.index(name), name, column)
            column = pc.fill_null(column, "")
            faults.append((cell, "empty", "", cols.is_blank(column)))
            nul, long = pc.match_substring(column, "\0"), pc.greater(pc.utf8_length(column), self.max_characters)
            faults.append((cell, "text with a NUL character", " (maybe the file was UTF-16)", nul))
            faults.append((cell, f"longer than {self.max_characters} characters", " (or raise `max_characters`)", long))
        fault = np.select([np.asarray(mask) for *_, mask in faults], range(len(faults)), -1)
        bad = np.flatnonzero(keep & (fault >= 0))
        if len(bad) and self.bad_rows == "error":
            cell, reason, hint, _ = faults[fault[bad[0]]]
            advice = "Mend the row, or drop such rows with `bad_rows`=drop"
            raise InputError(f"{chunk.name}: {chunk.unit} {chunk.number[bad[0]]}: {cell} is {reason}{hint}. {advice}")
        dropped.update(faults[number][1] for number in np.sort(fault[bad]))
        return table.filter(pa.array(keep & (fault < 0)))

    def _stream(self) -> Iterator[dict[str, Any]]:
        rows = (row for table in self._tables() for row in self._cells(table)[0].to_pylist())
        number, held_out = -1, self.held_out + self.validation_rows
        for number, row in enumerate(rows):
            side = "test" if number < self.held_out else "validation" if number < held_out else "train"
            if self.split in ("all", side):
                yield row
            elif side == "train":
                return
        sizes = f"`held_out`={self.held_out} and `validation_rows`={self.validation_rows}"
        fault = f"`path`={self.path}: {sizes} take all {number + 1} rows of the stream. Use less, or `streaming`=false."
        require(self.split != "train" or number >= held_out, fault)

    def _cells(self, table: pa.Table) -> tuple[pa.Table, list[str]]:
        """The columns of ``rows``, and the names of the labels; a stream's labels must be numbers, as it cannot be sorted."""
        cells, names = {name: table[name] for name in self.columns}, list[str]()
        if self.label is not None and self.streaming:
            advice = " With `streaming`=false words are numbered."
            cells["label"] = pc.fill_null(cols.label_numbers(table[self.label], self.path, self.label, advice), -1)
        elif self.label is not None:
            cells["label"], names = cols.label_ids(table[self.label], self.path, self.label)
        if self.position is not None:
            cells["position"] = pc.fill_null(cols.to_integers(table[self.position], self.path, self.position, "position"), -1)
        return pa.table(cells), names

    def _features(self, names: Sequence[str] = ()) -> Features:
        numbers = dict.fromkeys(sorted(self.provides - {"all_rows"}), Value("int64"))
        labels = {"label": ClassLabel(names=list(names))} if names else {}
        return Features(dict.fromkeys(self.columns, Value("string")) | numbers | labels)


def _most_text(data: DataPath, available: Sequence[str]) -> str:
    """The column whose first cells have most letters."""
    chunk = next(data.chunks((), available), None) if data.files else None
    require(chunk is not None or not data.files, f"`path`={data.path} has the columns {', '.join(available)}, but no rows.")
    rows = chunk.table.slice(0, 100).to_pylist() if chunk else []
    cells = {name: [row[name] for row in rows if isinstance(row[name], str)] for name in available}
    return max(available, key=lambda name: sum(map(str.isalpha, "".join(cells[name]))))


@dataclass(frozen=True)
class Groups:
    r"""Pairs of rows of ``files`` with the same value in the column ``group``, in order: 1-2, 3-4, ...

    The last row of a group of odd size is left out, and so are groups of one, which are counted in a warning. ``label`` is the
    number of the group, so that its rows are never negatives of each other. Whole groups are held out.

    >>> import pathlib, tempfile
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "captions.csv"
    >>> _ = file.write_text("text,picture\nA dog.,1\nA cat.,2\nA puppy.,1\nA kitten.,2\n")
    >>> Groups(TextFiles(str(file), ["text"]), "picture").rows()[1]
    {'anchor': 'A cat.', 'positive': 'A kitten.', 'label': 1}
    """

    files: TextFiles
    group: str
    columns: ClassVar[tuple[str, ...]] = ("anchor", "positive")  # two rows of a group
    provides: ClassVar[frozenset[str]] = frozenset({"label", "all_rows"})

    def __post_init__(self) -> None:
        advice = "groups are gathered over all rows. Use `files.streaming`=false."
        require(not self.files.streaming, f"`files.streaming`=true: {advice}")
        names = ", ".join(self.files.columns)
        require(len(self.files.columns) == 1, f"`files.columns`=[{names}]: groups pair the rows of one text column. Name one.")
        # Also checks that there is such a column.
        object.__setattr__(self, "files", replace(self.files, label=self.group, held_out_by=self.group))

    def rows(self) -> Dataset:
        """The pairs, by group."""
        table = self.files.rows().data.table.combine_chunks()
        label = table["label"].to_numpy()
        order = np.argsort(label, kind="stable")
        order = order[label[order] >= 0]  # an empty cell names no group
        group = label[order]
        start = np.flatnonzero(np.diff(group, prepend=-1))
        sizes = np.diff(start, append=len(group))
        position = np.arange(len(group)) - np.repeat(start, sizes)
        anchors = np.flatnonzero((position % 2 == 0) & (position + 1 < np.repeat(sizes, sizes)))
        path, single, ungrouped = self.files.path, (sizes == 1).sum(), len(label) - len(order)
        advice = "Name another column in `group`."
        require(len(anchors), f"`files.path`={path}: no two rows share a value of '{self.group}'. {advice}")
        if ungrouped or single:
            warn_once(f"{path}: {single} groups of one row and {ungrouped} rows without '{self.group}' left out.")
        text = table[self.files.columns[0]]
        pairs = {"anchor": text.take(order[anchors]), "positive": text.take(order[anchors + 1])}
        return cols.as_dataset(pa.table(pairs | {"label": pa.array(group[anchors], pa.int64())}), self.fingerprint())

    def fingerprint(self) -> str:
        """Hash the files' fingerprint and the group."""
        return cols.text_fingerprint("groups-1", self.group, self.files.fingerprint())
