"""Raw books: .txt files as sentences in order."""

import pytest

from tercet.data import Books
from tercet.errors import InputError

FIRST = '"Well, Mr. Smith," he said. "It is late!"\nShe laughed; Dr. Jones did\nnot.\n\n* * *\n\nWhat now?\n'
GUTENBERG = f"""Title: A Book
Produced by somebody. Please read this.
*** START OF THE PROJECT GUTENBERG EBOOK A BOOK ***
{FIRST}
*** END OF THE PROJECT GUTENBERG EBOOK A BOOK ***
Donate. Please.
"""


@pytest.fixture
def library(tmp_path):
    folder = tmp_path / "library"
    (folder / "b").mkdir(parents=True)
    (folder / "a.txt").write_text(FIRST)
    (folder / "b" / "c.txt").write_text("One. Two of them. " + "x" * 60 + ".\nAnother one. The end.")
    (folder / "silent.txt").write_text("\n\n***\n")
    (folder / "empty.txt").write_text("")
    return folder


def test_files_are_documents_and_sentences_have_places(library, caplog):
    rows = Books(str(library), max_characters=50).rows()
    found = [
        (rows.features["label"].int2str(label), position, text)
        for label, position, text in zip(rows["label"], rows["position"], rows["text"], strict=True)
    ]
    assert found == [
        ("a.txt", 0, '"Well, Mr. Smith," he said.'),
        ("a.txt", 1, '"It is late!"'),
        ("a.txt", 2, "She laughed; Dr. Jones did not."),
        ("a.txt", 3, "What now?"),
        ("b/c.txt", 0, "One."),
        ("b/c.txt", 1, "Two of them."),
        ("b/c.txt", 3, "Another one."),
        ("b/c.txt", 4, "The end."),
    ]
    assert "2 documents, 8 sentences; left out: 2 files without a sentence, 1 sentences longer than 50" in caplog.text


def test_project_gutenbergs_frame_is_not_the_book(tmp_path):
    (tmp_path / "plain.txt").write_text(FIRST)
    (tmp_path / "framed.txt").write_text(GUTENBERG)
    rows = Books(str(tmp_path)).rows()
    texts = {name: [] for name in ("framed.txt", "plain.txt")}
    for label, text in zip(rows["label"], rows["text"], strict=True):
        texts[rows.features["label"].int2str(label)].append(text)
    assert texts["framed.txt"] == texts["plain.txt"] != []


def test_whole_books_are_held_out(tmp_path):
    for i in range(12):
        (tmp_path / f"{i}.txt").write_text(" ".join(f"Book {i} has a sentence {j}." for j in range(10)))
    sides = {side: Books(str(tmp_path), split=side, held_out=25).rows() for side in ("train", "test", "all")}
    labels = {side: set(rows["label"]) for side, rows in sides.items()}
    assert not labels["train"] & labels["test"] and labels["train"] | labels["test"] == labels["all"]
    assert len(sides["test"]) == 20, "two whole books of ten"
    prints = {Books(str(tmp_path), split=side, held_out=25).fingerprint() for side in sides}
    assert len(prints) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "dev"}, "split=dev"),
        ({"language": "English"}, "language=English: a code"),
        ({"max_characters": 0}, "max_characters=0"),
        ({"max_characters": 3}, "no file holds a sentence"),
    ],
)
def test_bad_settings(library, change, message):
    with pytest.raises(InputError, match=message):
        Books(str(library), **change).rows()


def test_bad_files(library, tmp_path):
    (library / "bad.txt").write_bytes("né.".encode("latin-1"))
    with pytest.raises(InputError, match=r"bad.txt.*line 1, byte 1 .* is not UTF-8"):
        Books(str(library)).rows()
    (tmp_path / "table.csv").write_text("text\nx\n")
    with pytest.raises(InputError, match=r"holds csv. Raw books are .txt files"):
        Books(str(tmp_path / "table.csv"))


def test_a_splitter_that_is_missing_is_named(library, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sentencex", None)
    with pytest.raises(InputError, match=r"pip install 'tercet\[books\]'"):
        Books(str(library), language="de").rows()
