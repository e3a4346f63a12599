"""Raw books: a folder of .txt files as sentences in order."""

import os
import re
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset, Value

from tercet.data.columns import as_dataset, check_split, files_fingerprint, split_rows, text_fingerprint
from tercet.data.data_path import DataPath, resolve
from tercet.data.file_formats import read_text
from tercet.errors import InputError, require
from tercet.messages import warn_once

GUTENBERG = re.compile(r"^\*\*\* ?(START|END) OF (?:THE|THIS) PROJECT GUTENBERG.*$", re.MULTILINE)


@dataclass(frozen=True)
class Books:
    """The sentences of a folder of .txt files, each a document; a blank line ends a paragraph. Sentencex splits sentences.

    ``label`` is the document, ``position`` the number of the sentence in it. Left out are Project Gutenberg's license,
    lines without a letter and, counted in a warning, sentences of more than ``max_characters`` (their neighbors are then
    two positions apart) and files without a sentence. ``language`` is a code such as en or de. ``split`` names the
    sentences to take: "train", "test" or "validation", or "all". With ``held_out`` above 0, "test" has whole books of at
    most that many sentences, "train" the other books; with ``validation_rows`` some of these are the ``split``
    "validation".

    >>> import pathlib, tempfile
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> _ = (folder / "book.txt").write_text("It was late. Nobody came.")
    >>> Books(str(folder)).rows()[1]
    {'text': 'Nobody came.', 'label': 0, 'position': 1}
    """

    path: str
    language: str = "en"
    split: str = "all"
    held_out: int = 0
    validation_rows: int = 0
    max_characters: int = 1000
    columns: ClassVar[tuple[str, ...]] = ("text",)
    provides: ClassVar[frozenset[str]] = frozenset({"label", "position", "all_rows"})

    def __post_init__(self) -> None:
        check_split(self.split, self.held_out, self.validation_rows)
        require(self.max_characters >= 1, f"`max_characters`={self.max_characters}: 1 or more.")
        require(re.fullmatch("[a-z]{2,3}", self.language), f"`language`={self.language}: a code as en, de or fr.")
        try:
            kind = resolve(self.path).format.kind
        except InputError as error:
            raise InputError(f"{error.message} Of these raw books are .txt files only.") from error
        require(kind == "txt", f"`path`={self.path} holds {kind}. Raw books are .txt files; read tables with TextFiles.")

    def rows(self) -> Dataset:
        """The split's sentences, document by document."""
        data = resolve(self.path)
        table, names = _read(data, files_fingerprint("txt", data.files), self.language, self.max_characters)
        by = pa.chunked_array([np.array(names, dtype=object)[table["label"].to_numpy()]])
        rows = split_rows(table, by, self.split, self.held_out, self.path, self.validation_rows)
        features = {"text": Value("string"), "label": ClassLabel(names=names), "position": Value("int64")}
        return as_dataset(rows, self.fingerprint(), features)

    def fingerprint(self) -> str:
        """Hash the files' contents and every option but where the files are."""
        return text_fingerprint("books-1", repr(astuple(self)[1:]), files_fingerprint("txt", resolve(self.path).files))


@lru_cache(maxsize=2)  # both splits are taken from the same sentences
def _read(data: DataPath, fingerprint: str, language: str, max_characters: int) -> tuple[pa.Table, list[str]]:
    texts, label, position, names = list[str](), list[int](), list[int](), list[str]()
    empty, too_long, root = 0, 0, os.path.commonpath([file.parent for file in data.files])
    for file in data.files:
        found = [s for s in _sentences(file, data, language) if re.search(r"\w", s)]
        short = [(i, s) for i, s in enumerate(found) if len(s) <= max_characters]
        too_long += len(found) - len(short)
        if not short:
            empty += 1
            continue
        label += [len(names)] * len(short)
        position += [i for i, _ in short]
        texts += [s for _, s in short]
        names.append(file.relative_to(root).as_posix())
    require(names, f"`path`={data.path}: no file holds a sentence. Is it the right folder?")
    left_out = f"; left out: {empty} files without a sentence, {too_long} sentences longer than {max_characters} characters"
    warn_once(f"{data.path}: {len(names)} documents, {len(texts)} sentences{left_out if empty or too_long else ''}.")
    return pa.table({"text": texts, "label": pa.array(label, pa.int64()), "position": position}), names


def _sentences(file: Path, data: DataPath, language: str) -> Iterator[str]:
    """The sentences of a file in order, each without line ends."""
    try:
        from sentencex import segment
    except ModuleNotFoundError as error:
        advice = "Run: pip install 'tercet[books]'."
        raise InputError(f"Raw books are split into sentences with sentencex, which is not installed. {advice}") from error
    text = read_text(file, data.describe(file))
    marks = {found[1]: found for found in reversed(list(GUTENBERG.finditer(text)))}  # the license is outside of them
    start, end = (marks["START"].end() if "START" in marks else 0), (marks["END"].start() if "END" in marks else None)
    for sentence in segment(language, text[start:end]):
        if words := sentence.split():
            yield " ".join(words)
