"""Raw books: a folder of .txt files as sentences in order."""

import re
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset, DatasetInfo, Features, Value
from datasets.table import InMemoryTable

from tercet.data.file_reader import lines
from tercet.data.paths import DataPath, resolve
from tercet.data.splits import files_fingerprint, held_out_rows, text_fingerprint
from tercet.errors import InputError
from tercet.messages import warn_once

SIDES = ("train", "test", "all")
GUTENBERG = re.compile(r"^\*\*\* ?(START|END) OF (?:THE|THIS) PROJECT GUTENBERG.*$", re.MULTILINE)


@dataclass(frozen=True)
class Books:
    """Each .txt file of a folder is a document; sentencex splits it into sentences, blank lines end a paragraph.

    ``label`` is the document, ``position`` the sentence's number in it. Of a file of Project Gutenberg only the book is
    read. Lines without a letter are left out; so are, counted and said, sentences longer than ``max_characters`` (their
    neighbours are two apart then) and files without a sentence. ``language`` is a code as en or de.

    With ``held_out`` above 0, ``split`` "test" is whole books with that many sentences at most, "train" the others.

    Raises:
        InputError: here or in a method, for whatever cannot be used.
    """

    path: str
    language: str = "en"
    split: str = "all"
    held_out: int = 0
    max_characters: int = 1000

    def __post_init__(self) -> None:
        if self.split not in SIDES:
            raise InputError(f"data.split={self.split}: use one of {', '.join(SIDES)}.")
        if self.max_characters < 1:
            raise InputError(f"data.max_characters={self.max_characters}: 1 or more.")
        if not re.fullmatch("[a-z]{2,3}", self.language):
            raise InputError(f"data.language={self.language}: a code as en, de or fr.")
        try:
            kind = resolve(self.path).kind
        except InputError as error:
            raise InputError(f"{error} Of these data=raw_books reads .txt files alone.") from error
        if kind != "txt":
            raise InputError(f"data.path={self.path} holds {kind}. data=raw_books reads .txt files; use data=files.")

    @property
    def columns(self) -> tuple[str, ...]:
        """The sentence."""
        return ("text",)

    def rows(self) -> Dataset:
        """The side's sentences, document by document."""
        place = resolve(self.path)
        table, names = _read(place, files_fingerprint(place, whole=True), self.language, self.max_characters)
        if self.held_out and self.split != "all":
            test = held_out_rows(_named(table["label"], names), self.held_out, self.path)
            table = table.filter(pa.array(test if self.split == "test" else ~test))
        numbers = {"label": ClassLabel(names=names), "position": Value("int64")}
        info = DatasetInfo(features=Features({"text": Value("string"), **numbers}))
        return Dataset(InMemoryTable(table), info=info, fingerprint=self.fingerprint())

    def fingerprint(self) -> str:
        """Hashes what the files hold and every option; not where they are."""
        return text_fingerprint("books-1", repr(astuple(self)[1:]), files_fingerprint(resolve(self.path), whole=True))


def _named(label: pa.ChunkedArray, names: list[str]) -> pa.ChunkedArray:
    return pa.chunked_array([np.array(names, dtype=object)[label.to_numpy()]])


@lru_cache(maxsize=2)  # both sides are cut from the same sentences
def _read(place: DataPath, print_: str, language: str, longest: int) -> tuple[pa.Table, list[str]]:
    texts: list[str] = []
    label: list[int] = []
    position: list[int] = []
    names: list[str] = []
    silent = left = 0
    for file in place.files:
        found = [s for s in _sentences(file, place, language) if re.search(r"\w", s)]
        kept = [(i, s) for i, s in enumerate(found) if len(s) <= longest]
        left += len(found) - len(kept)
        if not kept:
            silent += 1
            continue
        label += [len(names)] * len(kept)
        position += [i for i, _ in kept]
        texts += [s for _, s in kept]
        names.append(_name(file, place))
    if not names:
        raise InputError(f"data.path={place.path}: no file holds a sentence. Is it the right folder?")
    counts = f"{len(names)} documents, {len(texts)} sentences"
    less = f"; left out: {silent} files without a sentence, {left} sentences longer than {longest} characters"
    warn_once(f"data.path={place.path}: {counts}{less if silent or left else ''}.")
    return pa.table({"text": texts, "label": pa.array(label, pa.int64()), "position": position}), names


def _name(file: Path, place: DataPath) -> str:
    """The file's path from the folder that they share."""
    folders = [set(other.parents) for other in place.files]
    shared = max(set.intersection(*folders), key=lambda folder: len(folder.parts))
    return file.relative_to(shared).as_posix()


def _sentences(file: Path, place: DataPath, language: str) -> Iterator[str]:
    """In order, each on one line."""
    try:
        from sentencex import segment
    except ModuleNotFoundError as error:
        raise InputError(
            "data=raw_books splits sentences with sentencex, which is not installed. Run: pip install 'tercet[books]'."
        ) from error
    if not file.stat().st_size:
        return
    text = "\n".join(line for _, block in lines(file, f"data.path={place.path}, {file.name}") for line in block)
    for sentence in segment(language, _book(text)):
        if words := sentence.split():
            yield " ".join(words)


def _book(text: str) -> str:
    """What stands between Project Gutenberg's marks, where there are some."""
    marks = {found[1]: found for found in reversed(list(GUTENBERG.finditer(text)))}
    start = marks["START"].end() if "START" in marks else 0
    return text[start : marks["END"].start()] if "END" in marks else text[start:]
