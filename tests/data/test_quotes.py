"""Quotes in CSV and TSV: no cell takes up the rows after it."""

import csv
import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tercet.data.text_files import TextFiles
from tercet.errors import InputError
from tercet.evaluation.inputs import read_table

PIECES = st.lists(st.sampled_from(["a", "b c", '"', '""', ",", ";", "\n", "\r\n", "\t", "é", " "]), max_size=6)
CELLS = PIECES.map("".join).map(lambda cell: f"x{cell}y")  # not empty, and not stripped
quick = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def rows_of(path, columns):
    return [[row[name] for name in columns] for row in TextFiles(str(path), columns=columns).rows()]


def tables(width):
    return st.lists(st.lists(CELLS, min_size=width, max_size=width), min_size=1, max_size=6)


def may_be_unclosed(cell, width):
    return any(end in cell for end in "\r\n") and ("," in cell or width == 1)


@quick
@given(st.integers(1, 3).flatmap(tables), st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]), st.sampled_from(["\n", "\r\n"]))
def test_what_the_csv_module_writes_is_read_or_refused(tmp_path, rows, quoting, end):
    columns, file = [f"c{i}" for i in range(len(rows[0]))], io.StringIO(newline="")
    csv.writer(file, quoting=quoting, lineterminator=end).writerows([columns, *rows])
    (tmp_path / "a.csv").write_bytes(file.getvalue().encode())
    if any(may_be_unclosed(cell, len(columns)) for row in rows for cell in row):
        with pytest.raises(InputError, match=r"line \d+: the cell with a quote here"):
            rows_of(tmp_path / "a.csv", columns)
    else:
        assert rows_of(tmp_path / "a.csv", columns) == rows


@quick
@given(st.integers(1, 3).flatmap(tables), st.sampled_from(["\n", "\r\n"]))
def test_a_row_of_tsv_is_a_line(tmp_path, rows, end):
    rows = [[cell.replace("\t", "").replace("\r", "").replace("\n", "") for cell in row] for row in rows]
    columns = [f"c{i}" for i in range(len(rows[0]))]
    (tmp_path / "a.tsv").write_bytes("".join("\t".join(row) + end for row in [columns, *rows]).encode())
    assert rows_of(tmp_path / "a.tsv", columns) == rows
    table = read_table(tmp_path / "a.tsv", "path", columns, "a table")
    assert [list(row) for row in zip(*table.values(), strict=True)] == rows


@quick
@given(st.integers(1, 3).flatmap(tables))
def test_rows_that_nobody_quoted_are_never_fewer(tmp_path, rows):
    """Cells are joined by commas as they are, with quotes anywhere: an error, or as many rows as there are lines."""
    rows = [["".join(c for c in cell[1:] if c not in ",\r\n") or "z" for cell in row] for row in rows]
    columns = [f"c{i}" for i in range(len(rows[0]))]
    (tmp_path / "a.csv").write_text("".join(",".join(row) + "\n" for row in [columns, *rows]), encoding="utf-8")
    try:
        assert len(TextFiles(str(tmp_path / "a.csv"), columns=columns, bad_rows="drop").rows()) <= len(rows)
        table = read_table(tmp_path / "a.csv", "path", columns, "a table")
    except InputError:
        assume(any('"' in cell or not cell.strip() for row in rows for cell in row))
        return
    assert len(table["c0"]) == len(rows)


@pytest.mark.parametrize(
    ("name", "content", "line", "fault"),
    [
        ("a.csv", 'a,b\nA1,B1\nA2,"B2 never closed\nA3,B3\nA4,B4\n', 3, "not closed"),
        ("a.csv", 'text\nplain one\n"never closed\nplain three\n', 3, "not closed"),
        ("a.csv", 'text\n"Well," he said.\nNo.\n', 2, "goes on after the closing quote in line 2"),
        ("a.csv", 'text\nNo.\n"Where are you going?\nHome."\n', 3, "line ends in a file of one column"),
        ("a.csv", 'a,b\nx,"one\ntwo"\nA1,"B1\nA2,B2"\n', 4, "separators and line ends"),
        ("a.csv", 'a,b\n"x\ny","B1\nA2,B2"\n', 3, "separators and line ends"),
        ("a.csv", 'a,b\nA1,"B1\nA2",B2\n', 2, "3 cells, the header 2"),
        ("a.tsv", "a\tb\nA1\tB1\tC1\n", 2, "3 cells, the header 2. A cell cannot hold a tab"),
        ("a.tsv", '"a"\t"b"\nA1\tB1\n', 1, 'has "a", but a .tsv file has no quotes'),
    ],
)
def test_the_line_of_the_quote_is_named(tmp_path, name, content, line, fault):
    (tmp_path / name).write_text(content)
    columns = content.split("\n")[0].replace('"', "").replace("\t", ",").split(",")
    for read in (rows_of, lambda path, names: read_table(path, "path", names, "a table")):
        with pytest.raises(InputError) as caught:
            read(tmp_path / name, columns)
        assert f"{name}: line {line}" in str(caught.value)
        assert fault in str(caught.value)


def test_cells_of_two_lines_or_with_separators_are_read(tmp_path):
    (tmp_path / "a.csv").write_text('a,b\n"one\ntwo","x, ""y"""\nplain,"""Yes."""\n')
    assert rows_of(tmp_path / "a.csv", ["a", "b"]) == [["one\ntwo", 'x, "y"'], ["plain", '"Yes."']]


def test_quotes_are_letters_of_tsv(tmp_path):
    (tmp_path / "a.tsv").write_text('a\tb\nFirst\tfirst\n"Second\tsecond\nThird\t"third"\n')
    assert rows_of(tmp_path / "a.tsv", ["a", "b"]) == [["First", "first"], ['"Second', "second"], ["Third", '"third"']]


def test_a_quote_after_a_space_opens_no_cell(tmp_path):
    """Its line end would begin a row in silence, where both have the right number of cells."""
    (tmp_path / "a.csv").write_text('a,b\nx, "y\nu, v"\n')
    with pytest.raises(InputError, match=r"line 2: the cell ' \"y' begins with a space and a quote, which is not closed"):
        rows_of(tmp_path / "a.csv", ["a", "b"])
    (tmp_path / "a.csv").write_text('a,b\nx, "y"\nu, 5" wide\n')
    assert rows_of(tmp_path / "a.csv", ["a", "b"]) == [["x", '"y"'], ["u", '5" wide']]


KINDS = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_text_of_any_type_of_arrow(tmp_path, kind):
    cells = {"text": pa.array([" one", "two", "two"]), "label": pa.array(["b", None, "a"])}
    plain, typed = tmp_path / "plain.parquet", tmp_path / "typed.parquet"
    pq.write_table(pa.table(cells), plain)
    encode = (lambda x: x.dictionary_encode()) if pa.types.is_dictionary(kind) else (lambda x: x.cast(kind))
    pq.write_table(pa.table({name: encode(column) for name, column in cells.items()}), typed)
    for options in ({}, {"label": "label"}, {"where": {"label": "a"}}, {"split": "all", "held_out": 2}):
        expected, found = (TextFiles(str(path), columns=["text"], **options).rows() for path in (plain, typed))
        assert found.to_dict() == expected.to_dict()
    streamed = TextFiles(str(typed), columns=["text"], streaming=True).rows()
    assert [row["text"] for row in streamed] == ["one", "two", "two"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_of_no_width_are_blank(tmp_path, caplog, end):
    (tmp_path / "a.txt").write_bytes(
        end.join(["A line.", "\u200d", "\u200bvisible\u200b", "\u200b \ufeff\u00ad", "\ufe0f\u034f", ""]).encode()
    )
    assert [row["text"] for row in TextFiles(str(tmp_path / "a.txt")).rows()] == ["A line.", "\u200bvisible\u200b"]
    assert "3 blank lines skipped" in caplog.text
    (tmp_path / "a.csv").write_text("text\nx\n\u200b\u2060\n", encoding="utf-8")
    with pytest.raises(InputError, match="row 2: column 'text' is empty"):
        TextFiles(str(tmp_path / "a.csv")).rows()
