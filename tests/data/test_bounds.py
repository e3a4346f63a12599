"""Files that would take all memory, or the stack, or never end: one message each."""

import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tercet.data import TextFiles
from tercet.errors import InputError
from tercet.evaluation.inputs import read_table
from tercet.evaluation.verification import _row


def nested(levels, brackets="[]"):
    left, right = ("[", "]") if brackets == "[]" else ('{"a":', "}")
    return left * levels + "1" + right * levels


@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("[" * 100_000, "line [12] is cut or not JSON"),
        (nested(100_000), "line [12] is cut or not JSON"),
        (nested(900), "2 has values in more than 64 levels"),
        (nested(64, "{}"), "2 has values in more than 64 levels"),
        ("9" * 5000, "line [12] is cut or not JSON.*Exceeds the limit"),
        ("9" * 300, "2: column 'label' cannot be read.*whole numbers of 64 bits"),
    ],
)
def test_json_is_bounded(tmp_path, name, cell, message):
    rows = ['{"text": "a", "label": 1}', f'{{"text": "b", "label": {cell}}}']
    text = "\n".join(rows) if name == "x.jsonl" else f"[{rows[0]},\n{rows[1]}]"
    (tmp_path / name).write_text(text)
    reads = [lambda: TextFiles(str(tmp_path / name), ["text"], label="label").rows()]
    if name == "x.jsonl":
        reads.append(lambda: read_table(tmp_path / name, "path", ["text", "label"], "a table"))
    for read in reads:
        with pytest.raises(InputError, match=message):
            read()


def test_a_few_levels_are_data(tmp_path):
    (tmp_path / "x.jsonl").write_text(f'{{"text": "a", "more": {nested(60)}}}\n')
    assert TextFiles(str(tmp_path / "x.jsonl"), ["text"]).rows()[0] == {"text": "a"}


@pytest.mark.parametrize("option", ["label", "position"])
@pytest.mark.parametrize("value", [1e300, float("inf"), float("nan"), 0.5])
def test_numbers_that_are_not_whole_are_refused(tmp_path, option, value):
    pq.write_table(pa.table({"text": ["a", "b"], "n": pa.array([1.0, value])}), tmp_path / "x.parquet")
    with pytest.raises(InputError, match=rf"{option}=n: path=.* holds .* there; whole numbers of 64 bits"):
        TextFiles(str(tmp_path / "x.parquet"), ["text"], **{option: "n"}).rows()


def test_a_schema_of_endless_levels_is_refused(tmp_path):
    kind, value = pa.int64(), 1
    for _ in range(150):
        kind, value = pa.list_(kind), [value]
    pq.write_table(pa.table({"text": ["a"], "deep": pa.array([value], kind)}), tmp_path / "x.parquet")
    with pytest.raises(InputError, match=r"not Parquet.*too deeply nested"):
        TextFiles(str(tmp_path / "x.parquet"), ["text"])


@pytest.mark.parametrize("name", ["x.txt", "x.csv", "x.jsonl"])
def test_a_line_without_an_end_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setattr("tercet.data.file_formats.LINE", 100)
    (tmp_path / name).write_text({"x.jsonl": '{"text": "a"}'}.get(name, "text") + "\n" + "a" * 200)
    with pytest.raises(InputError, match="a line has more than 100 characters"):
        TextFiles(str(tmp_path / name), ["text"]).rows()


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.csv")
    with pytest.raises(InputError, match=r"x.csv is a device or a pipe"):
        TextFiles(str(tmp_path / "x.csv"))


@pytest.mark.parametrize("number", [float("inf"), float("nan"), 1e300, "9" * 5000, 10**12])
def test_numbers_of_pairs_are_bounded(number):
    for row in ([number, True, "a", 1, "a", 2], [1, True, "a", number, "a", 2], [1, False, "a", 1, "b", number]):
        with pytest.raises(InputError, match="whole numbers") as caught:
            _row(row, "pairs")
        assert len(str(caught.value)) < 400
