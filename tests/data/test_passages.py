"""Single sentences and passages of consecutive ones, without those that models are evaluated with."""

import pytest

from tercet.data import Passages, TextFiles
from tercet.errors import InputError

BOOKS = "text,book,n\nTwo b.,b,1\nOne a.,a,0\nTwo a.,a,1\nThree a.,a,2\nOne b.,b,0\nFour b.,b,3\nLast.,,4\n"


@pytest.fixture
def books(tmp_path):
    (tmp_path / "books.csv").write_text(BOOKS)
    return TextFiles(str(tmp_path / "books.csv"), ["text"], "book", "n", held_out_by="book")


@pytest.fixture
def sentences(tmp_path):
    (tmp_path / "sentences.txt").write_text("It rains.\nTwo, A!\nDogs run.\n")
    return TextFiles(str(tmp_path / "sentences.txt"))


def texts(*args, **options):
    return Passages(*args, **options).rows()["text"][:]


def test_consecutive_sentences_of_a_document_are_joined(books):
    assert texts({"books": books}) == ["Last.", "One a. Two a. Three a.", "One b. Two b.", "Four b."], "in order; 2 is missing"


def test_passages_are_as_long_as_they_may_be(books):
    assert texts({"books": books}, max_characters=15) == ["Last.", "One a. Two a.", "Three a.", "One b. Two b.", "Four b."]
    assert texts({"books": books}, max_characters=1)[1:3] == ["One a.", "Two a."], "a sentence may be longer"


def test_sources_follow_each_other_and_may_be_left_out(books, sentences):
    assert texts({"sentences": sentences, "books": books})[:4] == ["It rains.", "Two, A!", "Dogs run.", "Last."]
    assert texts({"sentences": sentences, "books": None}) == ["It rains.", "Two, A!", "Dogs run."]


def test_what_models_are_evaluated_with_is_left_out(books, sentences, tmp_path, caplog):
    (tmp_path / "sts.csv").write_text("sentence1,sentence2\nDOGS run?,other\n two-A,ONE B\n")
    unwanted = {"sts": TextFiles(str(tmp_path / "sts.csv"), ["sentence1", "sentence2"])}
    found = texts({"sentences": sentences, "books": books}, unwanted)
    assert found == ["It rains.", "Last.", "One a.", "Three a.", "Two b.", "Four b."], "a passage ends there"
    assert "4 texts that models are evaluated with" in caplog.text


def test_the_fingerprint_is_of_all_that_makes_the_rows(books, sentences):
    made = [
        Passages({"books": books}), Passages({"books": books}, max_characters=9), Passages({"sentences": sentences}),
        Passages({"sentences": sentences}, {"books": books}), Passages({"sentences": sentences, "books": books}),
    ]  # fmt: skip
    assert len({source.fingerprint() for source in made}) == 5
    assert Passages({"books": books}).fingerprint() == made[0].fingerprint()


def test_mistakes(books, tmp_path):
    with pytest.raises(InputError, match="max_characters=0"):
        Passages({"books": books}, max_characters=0)
    with pytest.raises(InputError, match="sources are empty"):
        Passages({"books": None})
    with pytest.raises(InputError, match="exclude leaves no text"):
        Passages({"books": books}, {"books": books}).rows()
    (tmp_path / "long.txt").write_text("a\nb\n")
    stream = TextFiles(str(tmp_path / "long.txt"), streaming=True)
    with pytest.raises(InputError, match="streamed is a stream"):
        Passages({"streamed": stream})
