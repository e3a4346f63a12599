"""Every bad input is one InputError that says what was got, where, and which parameter to change."""

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tercet.data.text_files import TextFiles
from tercet.errors import InputError


@pytest.fixture
def told(tmp_path):
    """Write ``name``, read it with ``options``: the message of the InputError."""

    def tell(name, content, **options):
        path = tmp_path / name
        if isinstance(content, pa.Table):
            pq.write_table(content, path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        messages = []
        for streaming in (False, True):
            with pytest.raises(InputError) as caught:
                list(TextFiles(str(path), streaming=streaming, **options).rows())
            messages.append(str(caught.value))
        assert messages[0] == messages[1]
        assert "\n" not in messages[0].replace(str(path), "")
        return messages[0]

    return tell


def has(message, *parts):
    for part in parts:
        assert part in message, message


def test_missing_path_names_what_is_near(tmp_path, monkeypatch):
    (tmp_path / "sentences.csv").write_text("text\nx\n")
    with pytest.raises(InputError, match=r"does not exist.*near: sentences.csv.*path takes a .txt"):
        TextFiles(str(tmp_path / "sentence.csv"))
    with pytest.raises(InputError, match=r"which holds sentences.csv"):
        TextFiles(str(tmp_path / "zzzz.txt"))
    monkeypatch.setenv("TERCET_DATA", str(tmp_path))
    with pytest.raises(InputError, match=r"near: sentences.csv"):
        TextFiles("sentences.cvs")


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl", "a.json", "a.parquet"])
def test_empty_file(told, name):
    has(told(name, b""), "path=", name, "the file is empty")


def test_only_blank_lines(told):
    has(told("a.txt", "\n \n"), "has no rows")
    has(told("a.csv", "text\n"), "has no rows")


def test_folders(tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="the folder is empty"):
        TextFiles(str(tmp_path / "none"))
    (tmp_path / "none/x.doc").write_text("x")
    with pytest.raises(InputError, match=r"the folder holds x.doc"):
        TextFiles(str(tmp_path / "none"))
    for name in ("a.txt", "b.csv"):
        (tmp_path / name).write_text("text\nx\n")
    with pytest.raises(InputError, match=r"mixes kinds \(txt: a.txt, csv: b.csv\)"):
        TextFiles(str(tmp_path))


def test_a_folder_whose_files_disagree(tmp_path):
    (tmp_path / "a.csv").write_text("text\nx\n")
    (tmp_path / "b.csv").write_text("txt\nx\n")
    with pytest.raises(InputError, match=r"file b.csv has the columns txt. Did you mean 'txt'\?"):
        TextFiles(str(tmp_path)).rows()


def test_unknown_and_packed_files(told):
    has(told("a.xlsx", "x"), "is a '.xlsx' file", "path takes a .txt")
    has(told("a.csv.gz", "x"), "is packed (.gz)", "Unpack it first")
    has(told("a.txt", b"\x1f\x8b\x08rest"), "byte 0", "gzip")
    has(told("a.csv", b"PK\x03\x04rest"), "byte 0", "zip")


def test_columns(told):
    table = "sentance,Kind\nx,1\n"
    has(told("a.csv", table), "has the columns sentance, Kind", "columns=[sentance]")
    has(told("a.csv", "id,note,when\n1,a long note,2024\n2,another,2025\n"), "columns=[note]")  # numbers are no example
    has(told("a.parquet", pa.table({"id": [1, 2], "note": ["a", "b"]})), "columns=[note]")
    has(told("a.csv", table, columns=["sentence"]), "columns names 'sentence'", "Did you mean 'sentance'?")
    has(told("a.csv", table, columns=["sentance"], label="kind"), "label names 'kind'", "Did you mean 'Kind'?")
    has(told("a.csv", table, columns=["sentance"], where={"zz": 1}), "where names 'zz'", "sentance, Kind")
    has(told("a.csv", table, columns=["Kind", "Kind"]), "none of them twice")
    has(told("a.csv", table, columns="Kind"), "columns=[Kind]")
    has(told("a.txt", "x\n", columns=["sentence"]), "has the columns text")
    has(told("a.csv", "text,text\nx,y\n"), "the column text is there twice")
    has(told("a.csv", table, columns=["sentance"], where={"Kind": 2}), "keeps no row", "where")


def test_not_utf8(told):
    has(told("a.txt", b"fine\nsm\xf8rrebr\xf8d\n"), "line 2, byte 7 (0xf8) is not UTF-8", "Save the file as UTF-8")
    has(told("a.csv", b"text\nfine\nsm\xf8rrebr\xf8d\n"), "line 3, byte 12 (0xf8) is not UTF-8")
    has(told("a.jsonl", b'{"text": "\xe9"}\n'), "line 1, byte 10 (0xe9) is not UTF-8")
    has(told("a.txt", "text\n".encode("utf-16")), "line 1, byte 0", "UTF-16")


def test_not_utf8_after_the_first_rows(told, monkeypatch):
    monkeypatch.setattr("tercet.data.file_formats.ROWS", 2)
    has(told("a.txt", b"one\ntwo\nthree\nfour\nfi\xffe\n"), "line 5, byte 21 (0xff)")
    has(told("a.csv", b"text\none\ntwo\nthree\nfour\nfi\xffe\n"), "line 6, byte 26 (0xff)")


def test_nul_bytes(told):
    has(told("a.txt", b"one\ntw\0o\n"), "line 2 has a NUL byte", "UTF-16")
    has(told("a.csv", b"text\none\ntw\0o\n"), "line 3 has a NUL byte", "UTF-16")
    has(told("a.jsonl", '{"text": "a\\u0000b"}\n'), "line 1", "NUL character", "bad_rows=drop")
    has(told("a.parquet", pa.table({"text": ["ok", "a\0b"]})), "row 2", "NUL character")


def test_broken_csv(told):
    has(told("a.csv", "text\nHello, world\n"), "line 2 has 2 cells, the header 1", "must be quoted")
    has(told("a.csv", "text,b\nx,y\nz\n"), "line 3 has 1 cells, the header 2")
    has(told("a.tsv", "text\tb\nx\ty\tz\n"), "line 2 has 3 cells, the header 2")


def test_broken_json(told):
    good = '{"text": "fine"}\n'
    has(told("a.jsonl", good + '{"text": "cut'), "line 2 is cut or not JSON", "one whole object")
    has(told("a.jsonl", good + "[1]\n"), "line 2 is a JSON list")
    has(told("a.json", '[{"text": "fine"},\n{"te'), "line 2 is cut or not JSON")
    has(told("a.json", '["fine"]'), "row 1 is a JSON str")
    has(told("a.json", '{\n"text": "fine"\n}'), "line 1 is cut or not JSON")
    has(told("a.jsonl", '{"text": "\\ud800"}\n'), "column 'text' cannot be read")


def test_broken_parquet(told, tmp_path):
    pq.write_table(pa.table({"text": ["fine"] * 99}), tmp_path / "b.parquet")
    content = (tmp_path / "b.parquet").read_bytes()
    has(told("a.parquet", content[:-20]), "cut or not Parquet")
    has(told("a.parquet", b"text\nfine\n"), "cut or not Parquet")
    # The footer is whole, the first page is not.
    assert "cut or not Parquet" in told("a.parquet", content[:4] + b"\xff" * 40 + content[44:])


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("a.csv", 'text,b\nx,1\n"",2\n', "row 2"),
        ("a.csv", "text,b\nx,1\n  ,2\n", "row 2"),
        ("a.jsonl", '{"text": "x"}\n\n{"text": null}\n', "line 3"),
        ("a.jsonl", '{"text": "x"}\n{"b": "y"}\n', "line 2"),
        ("a.parquet", pa.table({"text": ["x", None]}), "row 2"),
        ("a.parquet", pa.table({"text": ["x", " \t"]}), "row 2"),
    ],
)
def test_empty_cells(told, name, content, where):
    message = told(name, content, columns=["text"])
    has(message, name, where, "column 'text' is empty")
    assert message.endswith("or drop such rows with bad_rows=drop")


def test_long_cells(told):
    message = told("a.txt", "short\n" + "x" * 31 + "\n", max_characters=30)
    has(message, "line 2: column 'text' is longer than 30 characters (or raise max_characters)")
    assert message.endswith("or drop such rows with bad_rows=drop")


def test_cells_that_are_no_text(told):
    has(told("a.jsonl", '{"text": "x"}\n{"text": 5}\n'), "line 2: column 'text' is not text", "bad_rows=drop")
    has(told("a.parquet", pa.table({"text": [1, 2]})), "column 'text' holds int64, not text", "columns")


def test_labels_and_positions_that_are_none(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x", "x"], "half": [1.5, 2.0], "list": [[1], [2]], "word": ["a", "b"]}), path)
    for options, parts in [
        ({"label": "half"}, ("label=half", "holds 1.5", "whole numbers")),
        ({"label": "list"}, ("label=list", "holds list", "text or integers")),
        ({"position": "word"}, ("position=word", "holds 'a'", "whole numbers")),
        ({"where": {"half": "word"}}, ("where", "holds double")),
    ]:
        with pytest.raises(InputError) as caught:
            TextFiles(str(path), columns=["text"], **options).rows()
        has(str(caught.value), *parts)


def test_another_separator(told):
    has(told("a.csv", "text;kind\nx;1\n"), "line 1", "'text;kind'", "cut by ';'")
    has(told("a.csv", "text;kind, or label\nx;1\n"), "line 2 has 1 cells", "cut by ';'")
    has(told("a.csv", "text\tkind\nx\t1\n"), "cut by '\\t'", "a .tsv file by tabs")
    has(told("a.tsv", "text,kind\nx,1\n"), "cut by ','")


def test_no_test_side(told):
    has(told("a.txt", "x\n", split="test"), "held_out=0 leaves no test side")


def test_streams_cannot_number_words(tmp_path):
    (tmp_path / "a.csv").write_text("text,y\nx,dog\n")
    with pytest.raises(InputError, match=r"label=y.*'dog'.*streaming=false"):
        list(TextFiles(str(tmp_path / "a.csv"), label="y", streaming=True).rows())


def test_too_few_rows_to_hold_out(tmp_path):
    (tmp_path / "a.txt").write_text("one sentence only\n")
    with pytest.raises(InputError, match=r"has 1 row.*held_out=5 needs 4 rows or more"):
        TextFiles(str(tmp_path / "a.txt"), split="train", held_out=5).rows()
    (tmp_path / "a.txt").write_text("the same\n" * 20)
    with pytest.raises(InputError, match=r"1 different value.* in 20 rows"):
        TextFiles(str(tmp_path / "a.txt"), split="train", held_out=5).rows()


@pytest.mark.parametrize("option", [{"split": "trian"}, {"bad_rows": "ignore"}])
def test_options_have_few_values(tmp_path, option):
    (tmp_path / "a.txt").write_text("x\n")
    with pytest.raises(InputError, match="choose one of"):
        TextFiles(str(tmp_path / "a.txt"), **option)


@pytest.mark.parametrize("streaming", [False, True])
def test_bad_rows_are_dropped_and_said_once(tmp_path, caplog, streaming):
    cells = ["fine", "", "x" * 40, None, 7, "good"]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": cell}) + "\n" for cell in cells))
    files = TextFiles(str(path), bad_rows="drop", max_characters=30, streaming=streaming)
    for _ in range(2):
        assert [row["text"] for row in files.rows()] == ["fine", "good"]
    said = f"{path}: 4 of 6 rows dropped (1 not text, 2 empty, 1 longer than 30 characters)."
    assert [r.message for r in caplog.records if r.name == "tercet"] == [said]


def test_nothing_left_after_dropping(tmp_path):
    (tmp_path / "a.csv").write_text('text\n""\n')
    with pytest.raises(InputError, match="all 1 rows were bad and dropped"):
        TextFiles(str(tmp_path / "a.csv"), bad_rows="drop").rows()


def test_lists_in_a_text_column_are_named(told):
    row = json.dumps({"query": "what", "pos": ["a thing", "a part"], "neg": ["another"]})
    has(told("a.jsonl", row, columns=["query", "pos", "neg"]), "line 1: column 'pos' is not text", "no list")
    has(told("a.parquet", pa.table({"query": ["x"], "pos": [["a"]]}), columns=["query", "pos"]), "column 'pos' holds list")


def test_numbers_and_brackets_without_end(told, tmp_path):
    good = '{"text": "x", "label": 1}\n'
    has(told("a.jsonl", good + '{"text": "x", "label": 1' + "0" * 20 + "}", label="label"), "line 2: column 'label' cannot be")
    has(told("a.jsonl", good + '{"text": "x", "label": "one"}', label="label"), "line 2: column 'label' cannot be read")
    has(told("a.jsonl", good + '{"text": "x", "label": ' + "9" * 5000 + "}"), "line 2 is cut or not JSON", "4300 digits")
    has(told("a.jsonl", good + '{"text": ' + "[" * 100_000), "line 2 is cut or not JSON", "recursion")
    has(told("a.json", "[]"), "has no rows")
    pq.write_table(pa.table({"text": ["x", "y"], "label": [1.0, 1e300]}), tmp_path / "b.parquet")
    with pytest.raises(InputError, match=r"holds 1e\+300 there; whole numbers of 64 bits"):
        TextFiles(str(tmp_path / "b.parquet"), columns=["text"], label="label").rows()


def test_the_encoding_of_windows_is_recognized(told):
    has(told("a.txt", "é is in both\n".encode("latin-1")), "iconv -f latin1")
    has(told("a.txt", "é, and later “quotes”\n".encode("cp1252")), "iconv -f cp1252")
    has(told("a.txt", "é\nplain\n“quotes”\n".encode("cp1252")), "line 1", "iconv -f cp1252")
    has(told("a.txt", "é".encode("latin-1") + "\n“quotes”\n".encode()), "line 1", "iconv -f latin1")  # the rest is UTF-8


def test_a_file_whose_name_is_not_utf8(tmp_path):
    try:
        (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("x")
    except OSError:
        pytest.skip("the file system takes UTF-8 only")
    with pytest.raises(InputError, match=r"name of the file b'caf\\xe9.txt' is not UTF-8. Rename it"):
        TextFiles(str(tmp_path))
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).unlink()
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    (folder / "a.txt").write_text("x")
    with pytest.raises(InputError, match=r"name of the folder b'caf\\xe9' is not UTF-8. Rename it"):
        TextFiles(str(tmp_path))


def test_a_stream_that_is_held_out_whole(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\n")
    stream = TextFiles(str(tmp_path / "a.txt"), split="train", held_out=2, validation_rows=1, streaming=True)
    with pytest.raises(InputError, match=r"held_out=2 and validation_rows=1 take all 3 rows of the stream.*streaming=false"):
        list(stream.rows())
    assert len(list(TextFiles(str(tmp_path / "a.txt"), split="train", held_out=2, streaming=True).rows())) == 1
