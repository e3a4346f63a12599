"""TextFiles: the same rows from every kind of file."""

import json
import os
import pickle
import unicodedata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tercet.data.text_files import TextFiles
from tercet.errors import InputError

needs_data = pytest.mark.skipif("TERCET_DATA" not in os.environ, reason="TERCET_DATA is not set")
SENTENCES = [f"sentence number {i}" for i in range(40)]


def write(path: Path, rows: list[dict], kind: str) -> Path:
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    else:
        cells = [list(rows[0]), *(list(map(str, row.values())) for row in rows)]
        if kind == "csv":
            cells = [['"' + cell.replace('"', '""') + '"' for cell in row] for row in cells]
        path.write_bytes("".join("\t,"[kind == "csv"].join(row) + "\n" for row in cells).encode())
    return path


def is_visible(line):
    return any(not c.isspace() and unicodedata.category(c) != "Cf" for c in line)


@pytest.fixture
def text(tmp_path):
    def make(lines=SENTENCES, name="a.txt"):
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(tmp_path / name)

    return make


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r\n"), min_size=1).filter(
            lambda t: t.strip() == t and t.lstrip("\ufeff") == t
        ),
        min_size=1,
    )
)
@pytest.mark.parametrize("kind", ["txt", "csv", "tsv", "jsonl", "json", "parquet"])
def test_any_text_comes_back(tmp_path, kind, lines):
    lines = [line for line in lines if is_visible(line) and not (kind == "tsv" and "\t" in line)]
    if not lines:
        return
    path = tmp_path / f"a.{kind}"
    if kind == "txt":
        path.write_bytes("\n".join(lines).encode())
    else:
        write(path, [{"text": line} for line in lines], kind)
    for streaming in (False, True):
        assert [row["text"] for row in TextFiles(str(path), streaming=streaming).rows()] == lines


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("name", ["a.txt", "a.csv"])
def test_line_ends_and_marks(tmp_path, end, mark, last, name):
    rows = [b"text"] * (name == "a.csv") + ["één".encode(), b"two"]
    (tmp_path / name).write_bytes(mark + end.join(rows) + end * last)
    assert TextFiles(str(tmp_path / name)).rows()["text"][:] == ["één", "two"]


def test_lines_end_at_line_ends_only(tmp_path):
    line = "a\u2028b\u2029c\x0bd\x0ce\x85f"
    (tmp_path / "a.txt").write_text(f"{line}\nx\n", encoding="utf-8", newline="")
    assert TextFiles(str(tmp_path / "a.txt")).rows()["text"][:] == [line, "x"]


def test_lines_cross_blocks(tmp_path, monkeypatch):
    lines = [f"é{i}" * 3 for i in range(50)]
    for rows in (1, 2, 7):
        monkeypatch.setattr("tercet.data.file_formats.ROWS", rows)
        (tmp_path / "a.txt").write_bytes("\r\n".join(lines).encode())
        assert TextFiles(str(tmp_path / "a.txt")).rows()["text"][:] == lines


def test_words_for_nothing_stay_text(tmp_path):
    words = ["NA", "null", "None", "NaN", "true", "1", "1.50", "#N/A"]
    path = write(tmp_path / "a.csv", [{"text": word} for word in words], "csv")
    assert TextFiles(str(path)).rows()["text"][:] == words
    path.write_text("text\n" + "\n".join(words))
    assert TextFiles(str(path)).rows()["text"][:] == words


def test_cells_are_stripped(tmp_path):
    (tmp_path / "a.txt").write_text(" a\t\n\u00a0b\n")
    assert TextFiles(str(tmp_path / "a.txt")).rows()["text"][:] == ["a", "b"]


def test_blank_lines_are_counted(text, caplog):
    path = text(["a", "", "b", "  ", "c"])
    assert len(TextFiles(path).rows()) == 3
    TextFiles(path).rows()
    assert [r.message for r in caplog.records] == [f"{path}: 2 blank lines skipped."]


def test_a_folder_is_read_by_name(tmp_path):
    (tmp_path / "deep").mkdir()
    for name, line in [("b.txt", "2"), ("a.txt", "1"), ("deep/c.txt", "3"), ("README.md", "no"), (".hid.txt", "no")]:
        (tmp_path / name).write_text(line)
    assert TextFiles(str(tmp_path)).rows()["text"][:] == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["only"], ("only",)),
        (["id", "text"], ("text",)),
        (["sentence", "label"], ("sentence",)),
        (["hard_neg", "sent1", "sent0"], ("sent0", "sent1", "hard_neg")),
        (["sent0", "sent1", "text"], ("sent0", "sent1")),
        (["anchor", "positive", "negative"], ("anchor", "positive", "negative")),
        (["anchor", "positive"], ("anchor", "positive")),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_columns_are_found_by_name(tmp_path, kind, names, found):
    path = write(tmp_path / f"a.{kind}", [{name: f"{name} cell" for name in names}], kind)
    files = TextFiles(str(path))
    assert files.columns == found
    assert files.rows().column_names == list(found)


def test_chosen_columns_keep_their_order(tmp_path):
    path = write(tmp_path / "a.csv", [{"a": "1", "b": "2", "c": "3"}], "csv")
    assert TextFiles(str(path), columns=["c", "a"]).rows()[0] == {"c": "3", "a": "1"}


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_where_keeps_rows(tmp_path, kind):
    rows = [{"text": f"t{i}", "split": "train" if i % 2 else "dev", "year": i} for i in range(10)]
    path = str(write(tmp_path / f"a.{kind}", rows, kind))
    assert TextFiles(path, where={"split": "train", "year": [1, 3, 4]}).rows()["text"][:] == ["t1", "t3"]
    assert len(TextFiles(path, where={"year": "7"}).rows()) == 1


@pytest.mark.parametrize(
    ("values", "ids"),
    [
        (["b", "a", "b", None], [1, 0, 1, -1]),
        ([10, 9, 10, None], [1, 0, 1, -1]),
        (["10", "9", "10", None], [1, 0, 1, -1]),
        ([3.0, 1.0, None], [1, 0, -1]),
        ([True, False], [1, 0]),
        ([None, None], [-1, -1]),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_labels_are_numbered(tmp_path, kind, values, ids):
    path = write(tmp_path / f"a.{kind}", [{"text": "x", "label": value} for value in values], kind)
    rows = TextFiles(str(path), label="label").rows()
    assert rows["label"][:] == ids
    assert rows.features["label"].dtype == "int64"


def test_csv_labels_are_numbered_and_may_be_empty(tmp_path):
    (tmp_path / "a.csv").write_text("text,kind\na,10\nb,9\nc,\n")
    assert TextFiles(str(tmp_path / "a.csv"), label="kind").rows()["label"][:] == [1, 0, -1]


def test_labels_that_look_like_numbers_are_texts(tmp_path):
    labels = ["01234", "1234", "007", "7", "10", "007", ""]
    (tmp_path / "a.csv").write_text("text,kind\n" + "".join(f"x,{label}\n" for label in labels))
    rows = TextFiles(str(tmp_path / "a.csv"), columns=["text"], label="kind").rows()
    assert rows.features["label"].names == ["007", "7", "10", "01234", "1234"]
    assert rows["label"][:] == [3, 4, 0, 1, 2, 0, -1]
    with pytest.raises(InputError, match=r"holds '01234' there, which is a text.*streaming=false"):
        list(TextFiles(str(tmp_path / "a.csv"), columns=["text"], label="kind", streaming=True).rows())
    (tmp_path / "a.csv").write_text("text,kind\nx,7\ny,\n")
    streamed = TextFiles(str(tmp_path / "a.csv"), columns=["text"], label="kind", streaming=True).rows()
    assert [row["label"] for row in streamed] == [7, -1]


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    labels=st.lists(st.one_of(st.from_regex(r"[+-]?0{0,2}[0-9]{1,3}(\.0)?", fullmatch=True), st.sampled_from("ab")), min_size=1)
)
def test_two_labels_are_one_if_their_texts_are(tmp_path, labels):
    path = write(tmp_path / "a.parquet", [{"text": "x", "label": label} for label in labels], "parquet")
    rows = TextFiles(str(path), columns=["text"], label="label").rows()
    assert [rows.features["label"].names[i] for i in rows["label"]] == labels
    if all(label.isdigit() for label in labels):
        assert [int(name) for name in rows.features["label"].names] == sorted(map(int, set(labels)))


def test_position_is_given_when_asked(tmp_path):
    path = write(tmp_path / "a.csv", [{"text": "x", "line": 7}], "csv")
    assert TextFiles(str(path), position="line").rows()[0] == {"text": "x", "position": 7}


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(st.sampled_from([f"Line {i}" for i in range(30)]), min_size=4, max_size=80), held_out=st.integers(2, 9))
def test_sides_share_nothing(tmp_path, lines, held_out):
    (tmp_path / "a.txt").write_text("\n".join(lines))
    path = str(tmp_path / "a.txt")
    try:
        test, train = (TextFiles(path, split=side, held_out=held_out).rows()["text"][:] for side in ("test", "train"))
    except InputError as error:
        assert "too few to hold some out" in str(error)
        return
    assert sorted(test + train) == sorted(lines)
    assert not set(test) & set(train)
    assert 2 <= len(test) <= min(held_out, max(2, len(lines) // 5))


def test_validation_rows_are_taken_from_the_training_rows(text):
    def rows(split, validation_rows=500):
        return TextFiles(text(), split=split, held_out=5, validation_rows=validation_rows).rows()["text"][:]

    train, validation, test = map(rows, ("train", "validation", "test"))
    assert sorted(train + validation + test) == sorted(SENTENCES)
    assert test == rows("test", 0), "the test rows are what they are without validation"
    assert len(validation) == (len(SENTENCES) - 5) // 5 and len(rows("validation", 2)) == 2
    with pytest.raises(InputError, match=r"split=validation: choose one of train, test, all"):
        rows("validation", 0)
    with pytest.raises(InputError, match=r"3 rows: .*validation_rows=500 needs 4"):
        TextFiles(text(SENTENCES[:5]), split="validation", held_out=2, validation_rows=500).rows()


def test_the_cut_depends_on_the_text_alone(text):
    first = TextFiles(text(), split="test", held_out=5).rows()["text"][:]
    turned = TextFiles(text([f"  {line.upper()} " for line in reversed(SENTENCES)]), split="test", held_out=5).rows()
    assert len(first) == 5
    assert sorted(turned["text"][:]) == sorted(line.upper() for line in first)


def test_a_fifth_is_held_out_at_most(text):
    assert len(TextFiles(text(SENTENCES[:20]), split="test", held_out=500).rows()) == 4
    assert len(TextFiles(text(SENTENCES[:4]), split="test", held_out=500).rows()) == 2
    assert len(TextFiles(text(SENTENCES[:4]), split="all", held_out=500).rows()) == 4


def test_whole_groups_are_held_out(tmp_path):
    rows = [{"text": f"t{i}", "book": f"b{i // 4}"} for i in range(80)]
    path = str(write(tmp_path / "a.parquet", rows, "parquet"))
    test = TextFiles(path, columns=["text"], split="test", held_out=9, held_out_by="book").rows()["text"][:]
    assert len(test) == 8
    assert {int(t[1:]) // 4 for t in test} == {int(test[0][1:]) // 4, int(test[-1][1:]) // 4}


def test_streams_cut_at_the_front(text):
    path = text()
    test = TextFiles(path, split="test", held_out=3, streaming=True).rows()
    train = TextFiles(path, split="train", held_out=3, streaming=True).rows()
    assert [row["text"] for row in test] == SENTENCES[:3]
    assert [row["text"] for row in train] == SENTENCES[3:]
    assert sorted(row["text"] for row in train.shuffle(seed=1, buffer_size=8)) == sorted(SENTENCES[3:])
    parts = {"test": SENTENCES[:3], "validation": SENTENCES[3:5], "train": SENTENCES[5:]}
    for split, expected in parts.items():
        found = TextFiles(path, split=split, held_out=3, validation_rows=2, streaming=True).rows()
        assert [row["text"] for row in found] == expected


def test_streamed_rows_are_the_same_rows(tmp_path):
    rows = [{"text": f"t{i}", "y": i % 3, "p": i, "s": "ab"[i % 2]} for i in range(50)]
    for kind in ("csv", "jsonl", "parquet"):
        path = str(write(tmp_path / f"a.{kind}", rows, kind))
        options = {"path": path, "label": "y", "position": "p", "where": {"s": "a"}}
        assert list(TextFiles(**options, streaming=True).rows()) == list(TextFiles(**options).rows())


def test_a_changed_file_is_read_anew(text):
    before = TextFiles(text())
    first, stat = before.fingerprint(), os.stat(text())
    path = text([line.replace("number", "NUMBER") for line in SENTENCES])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert TextFiles(path).fingerprint() != first
    assert TextFiles(path).rows()["text"][0] == "sentence NUMBER 0"


def test_the_fingerprint_follows_contents_and_options(text, tmp_path):
    files = TextFiles(text())
    assert TextFiles(text(name="b.txt")).fingerprint() == files.fingerprint()
    others = [TextFiles(files.path, split=s, held_out=3) for s in ("train", "test")]
    others += [
        TextFiles(files.path, max_characters=9),
        TextFiles(files.path, bad_rows="drop"),
        TextFiles(files.path, streaming=True),
    ]
    assert len({f.fingerprint() for f in [files, *others]}) == 6
    # In every process and on every machine; a new option or version makes another one.
    assert files.fingerprint() == "75c964f42a3024257ba4273aed89fab8"


def test_sources_can_be_pickled_and_compared(tmp_path):
    path = write(tmp_path / "a.csv", [{"text": "x", "split": "a"}], "csv")
    files = TextFiles(str(path), where={"split": "a"})
    again = pickle.loads(pickle.dumps(files))
    assert again == files
    assert hash(again) == hash(files)
    assert again.rows()["text"][:] == ["x"]


@needs_data
def test_a_million_sentences_are_read():
    assert len(TextFiles("sentences_unlabelled.parquet").rows()) == 991_263


@needs_data
def test_real_triplets():
    rows = TextFiles("nli_triplets.parquet", where={"split": "train"}).rows()
    assert rows.column_names == ["sent0", "sent1", "hard_neg"]
    assert len(rows) == 23_003


def test_quoted_line_ends_cross_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("tercet.data.file_formats.ROWS", 3)
    cells = [f'line one of {i}\nline "two"' for i in range(50)]
    path = write(tmp_path / "a.csv", [{"text": cell, "n": i} for i, cell in enumerate(cells)], "csv")
    assert TextFiles(str(path), position="n").rows()["text"][:] == cells


def test_row_numbers_cross_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("tercet.data.file_formats.ROWS", 3)
    (tmp_path / "a.csv").write_text("text,n\n" + "".join(f"cell,{i}\n" for i in range(70)) + ",70\n")
    with pytest.raises(InputError, match="row 71: column 'text' is empty"):
        TextFiles(str(tmp_path / "a.csv")).rows()
