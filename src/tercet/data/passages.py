"""Texts to pretrain on: single sentences, and passages of consecutive sentences."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from tercet.data.columns import as_dataset, text_fingerprint
from tercet.errors import InputError, require
from tercet.messages import warn_once
from tercet.types import Source


@dataclass(frozen=True)
class Passages:
    r"""The texts of all ``sources``, by name; consecutive sentences of a document are joined, up to ``max_characters``.

    A source whose rows have a label and a position, as ``Books``, is read as documents; a single sentence may be longer. Rows
    of other sources stay as they are. Texts of ``exclude``, as those that a model is evaluated with, are left out: two texts
    are the same up to case and everything that is neither letter nor digit. A passage ends where a sentence is left out.

    >>> import pathlib, tempfile
    >>> from tercet.data import TextFiles
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "book.csv"
    >>> _ = file.write_text("text,book,n\nIt was late.,a,0\nNobody came.,a,1\nThe end.,a,2\n")
    >>> Passages({"books": TextFiles(str(file), ["text"], "book", "n")}, max_characters=25).rows()["text"][:]
    ['It was late. Nobody came.', 'The end.']
    """

    sources: Mapping[str, Source | None] = field(hash=False)
    exclude: Mapping[str, Source | None] = field(default_factory=dict, hash=False)
    max_characters: int = 500
    columns: ClassVar[tuple[str, ...]] = ("text",)
    provides: ClassVar[frozenset[str]] = frozenset({"all_rows"})

    def __post_init__(self) -> None:
        require(self.max_characters >= 1, f"`max_characters`={self.max_characters}: 1 or more.")
        require(any(self.sources.values()), "`sources` are empty: there is nothing to read.")
        for name, source in (*self.sources.items(), *self.exclude.items()):
            if source is not None and getattr(source, "streaming", False):
                raise InputError(f"`sources`: {name} is a stream; all of its rows are needed. Read it without streaming.")

    def rows(self) -> Dataset:
        """One text a row, source by source."""
        tables = [(source.columns, _table(source)) for source in self.exclude.values() if source]
        keys = [pc.unique(_key(table[column])) for columns, table in tables for column in columns]
        unwanted = pa.concat_arrays(keys) if keys else pa.array([], pa.string())
        texts, left_out = list[str](), 0
        for source in filter(None, self.sources.values()):
            table = _table(source)
            for column in source.columns:
                kept = table.filter(pc.invert(pc.is_in(_key(table[column]), value_set=unwanted)))
                left_out += len(table) - len(kept)
                texts += _passages(kept, column, self.max_characters)
        if left_out:
            warn_once(f"{left_out} texts that models are evaluated with are left out.")
        require(texts, "`exclude` leaves no text of `sources`.")
        return as_dataset(pa.table({"text": texts}), self.fingerprint())

    def fingerprint(self) -> str:
        """Hash the fingerprints of the sources and the length."""
        parts = (",".join(each.fingerprint() for each in some.values() if each) for some in (self.sources, self.exclude))
        return text_fingerprint("passages-1", *parts, str(self.max_characters))


def _key(column: Any) -> Any:
    """What two texts that count as the same share."""
    return pc.replace_substring_regex(pc.utf8_lower(column), r"[^\p{L}\p{N}]+", "")


def _table(source: Source) -> pa.Table:
    """The rows of a source; of a data set that is a selection of others those alone."""
    return source.rows().flatten_indices().data.table


def _passages(table: pa.Table, column: str, most: int) -> Iterator[str]:
    """The texts, those that follow each other in a document joined where both fit into ``most`` characters."""
    if not {"label", "position"} <= set(table.column_names):
        yield from table[column].to_pylist()
        return
    table = table.sort_by([("label", "ascending"), ("position", "ascending")])
    passage, before = "", (-1, -1)
    for text, label, position in zip(*(table[name].to_pylist() for name in (column, "label", "position")), strict=True):
        follows = label >= 0 and (label, position - 1) == before
        if passage and not (follows and len(passage) + 1 + len(text) <= most):
            yield passage
            passage = ""
        passage, before = f"{passage} {text}".strip(), (label, position)
    if passage:
        yield passage
