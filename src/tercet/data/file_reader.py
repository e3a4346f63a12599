"""Read text, CSV, JSON and Parquet files, and data sets of the hub, in chunks of rows."""

import codecs
import contextlib
import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from tercet.data.columns import Chunk, check_column, unreadable
from tercet.data.paths import DataPath, open_hub
from tercet.errors import InputError

ROWS = 65_536  # rows of a chunk of Parquet or of the hub
BLOCK = 1 << 22  # characters of a chunk of lines, and bytes of a file that are checked before it is read
CSV_BLOCK = 1 << 24  # bytes of a chunk of CSV; a row may not be longer
CR = b"\r"  # ends a line where no line feed follows
DELIMITERS = {"csv": ",", "tsv": "\t"}
MAGIC = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"PAR1": "parquet", b"%PDF": "PDF"}


def column_names(data: DataPath, file: Path | None = None) -> list[str]:
    """The columns of a file (default: the first), from its start alone; of JSON those of its first objects."""
    if data.kind == "hub":
        return list(open_hub(data.path, streaming=True).column_names)
    file = file or data.files[0]
    name = data.describe(file)
    if file.stat().st_size == 0:
        raise unreadable(name, "the file is empty.")
    if data.kind != "parquet":
        check_text(file, name, BLOCK)
    if data.kind == "txt":
        return ["text"]
    if data.kind == "json":
        objects = next(_json_objects(file, name), ("", [], []))[2]
        return list(dict.fromkeys(key for row in objects for key in row))
    try:
        names = _open_table(file, data.kind)[0]
    except (pa.ArrowException, OSError) as error:
        raise _diagnose(file, name, data.kind, error) from error
    if data.kind != "parquet" and len(names) == 1 and (found := [mark for mark in (";", "\t", "|", ",") if mark in names[0]]):
        advice = "A .csv file is cut by commas, a .tsv file by tabs."
        raise unreadable(name, f"line 1, {names[0]!r}, seems to be cut by {found[0]!r}. {advice}")
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise unreadable(name, f"the column {', '.join(twice)} is there twice. Rename one of them.")
    return names


def read_chunks(data: DataPath, texts: Sequence[str], others: Sequence[str], streaming: bool) -> Iterator[Chunk]:
    """Read the text columns and ``others`` of all files, in order; ``streaming`` does not download all of a hub's data set."""
    columns = list(dict.fromkeys((*texts, *others)))
    if data.kind == "hub":
        rows = open_hub(data.path, streaming).select_columns(columns).with_format("arrow")
        yield from _number_rows(f"`path`={data.path}", rows.iter(ROWS))
    for file in data.files:
        name, available = data.describe(file), column_names(data, file)
        if data.kind != "json":  # a column that an object lacks is an empty cell
            for column in columns:
                check_column(name, available, column, "columns")
        if data.kind == "txt":
            yield from _read_text(file, name)
        elif data.kind == "json":
            yield from _read_json(file, name, columns, texts)
        else:
            yield from _number_rows(name, _read_table(file, name, data.kind, columns))


def _number_rows(name: str, tables: Iterator[pa.Table]) -> Iterator[Chunk]:
    start = 1
    for table in tables:
        yield Chunk(name, "row", pa.array(np.arange(start, start + len(table))), table)
        start += len(table)


def _open_table(file: Path, kind: str, columns: Sequence[str] = ()) -> tuple[list[str], Any]:
    """All column names, and record batches of the named columns; a cell of CSV is text, also "NA" and "1.50"."""
    if kind == "parquet":
        parquet = pq.ParquetFile(file)
        return list(parquet.schema_arrow.names), parquet.iter_batches(ROWS, columns=list(columns))
    reader = pyarrow.csv.open_csv(
        file,
        pyarrow.csv.ReadOptions(block_size=CSV_BLOCK),
        pyarrow.csv.ParseOptions(delimiter=DELIMITERS[kind], newlines_in_values=True),
        pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(columns, pa.string()), include_columns=columns),
    )
    return list(reader.schema.names), reader


def _read_table(file: Path, name: str, kind: str, columns: list[str]) -> Iterator[pa.Table]:
    row, batches = 0, None
    while True:
        try:
            batches = batches or iter(_open_table(file, kind, columns)[1])
            batch = next(batches, None)
        except (pa.ArrowException, OSError) as error:
            raise _diagnose(file, name, kind, error, row) from error
        if batch is None:
            return
        yield pa.Table.from_batches([batch])
        row += len(batch)


def read_lines(file: Path, name: str) -> Iterator[tuple[int, list[str]]]:
    r"""Read blocks of ``(number of the first line, lines)``; ``\r\n`` and ``\r`` end a line too and become ``\n``."""
    number = 1
    try:
        with file.open(encoding="utf-8-sig") as stream:
            while block := stream.readlines(BLOCK):
                if any("\0" in line for line in block):
                    raise ValueError("a NUL character")
                yield number, block
                number += len(block)
    except ValueError:  # UnicodeDecodeError is one
        check_text(file, name)
        raise


def _read_text(file: Path, name: str) -> Iterator[Chunk]:
    """The column ``text``, one row a line; blank lines are skipped and counted."""
    for first, block in read_lines(file, name):
        rows = [(number, line) for number, line in enumerate(block, first) if not line.isspace()]
        numbers, text = pa.array([n for n, _ in rows], pa.int64()), pa.array([line for _, line in rows], pa.string())
        yield Chunk(name, "line", numbers, pa.table({"text": text}), blank=len(block) - len(rows))


def _read_json(file: Path, name: str, columns: Sequence[str], texts: Sequence[str]) -> Iterator[Chunk]:
    """A cell that an object lacks is null. Cells of one column may be of several types, which pyarrow's reader refuses."""
    for unit, numbers, rows in _json_objects(file, name):
        odd = [any(not isinstance(row.get(column, ""), str | None) for column in texts) for row in rows]
        cells = {column: _json_column(rows, column, column in texts, name) for column in columns}
        yield Chunk(name, unit, pa.array(numbers, pa.int64()), pa.table(cells), pa.array(odd, pa.bool_()))


def _json_column(rows: list[dict[str, Any]], column: str, is_text: bool, name: str) -> pa.Array:
    cells = [row.get(column) for row in rows]
    try:
        return pa.array([cell if isinstance(cell, str) else None for cell in cells] if is_text else cells)
    except (pa.ArrowException, UnicodeEncodeError) as error:
        raise unreadable(name, f"column '{column}' cannot be read ({error}).") from error


def _json_objects(file: Path, name: str) -> Iterator[tuple[str, list[int], list[dict[str, Any]]]]:
    """Blocks of ``(unit, numbers, objects)``, of a file with an object a line or with one list of objects."""
    for first, block in read_lines(file, name):
        rows = {number: line for number, line in enumerate(block, first) if not line.isspace()}
        if first == 1 and next(iter(rows.values()), "").lstrip().startswith("["):
            try:
                items = json.loads(file.read_text(encoding="utf-8-sig"))
            except json.JSONDecodeError as error:
                raise unreadable(name, f"line {error.lineno}: {error.msg}. The file is cut or not JSON.") from None
            for number, item in enumerate(items, 1):
                if not isinstance(item, dict):
                    raise unreadable(name, f"row {number} is a JSON {type(item).__name__}, not an object.")
            yield "row", list(range(1, len(items) + 1)), items
            return
        yield "line", list(rows), [_json_object(line, number, name) for number, line in rows.items()]


def _json_object(line: str, number: int, name: str) -> dict[str, Any]:
    try:
        row: dict[str, Any] = json.loads(line)
        fault = None if type(row) is dict else f"is a JSON {type(row).__name__}"
    except json.JSONDecodeError as error:
        fault = f"is not JSON ({error.msg})"
    if fault:
        raise unreadable(name, f"line {number} {fault}. Each line must be one whole object.")
    return row


def check_text(file: Path, name: str, size: int | None = None) -> None:
    """Raise ``InputError`` for the first line, of the first ``size`` bytes, that is not plain UTF-8 text."""
    number, offset = 1, 0
    with file.open("rb") as stream:
        for line in stream:
            if offset == 0 and (found := [what for magic, what in MAGIC.items() if line.startswith(magic)]):
                advice = "Unpack or convert it to UTF-8 text."
                raise unreadable(name, f"byte 0: this is {found[0]} data under another name. {advice}")
            if offset == 0 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise unreadable(name, "line 1, byte 0: the file is UTF-16, not UTF-8. Save it as UTF-8.")
            try:
                line.decode()
            except UnicodeDecodeError as error:
                place = f"line {number + line.count(CR, 0, error.start)}, byte {offset + error.start}"
                advice = "Save the file as UTF-8 (for example: iconv -f latin1 -t utf-8)."
                raise unreadable(name, f"{place} (0x{line[error.start]:02x}) is not UTF-8. {advice}") from None
            if (nul := line.find(b"\0")) >= 0:
                advice = "Maybe the file is UTF-16 or binary: save it as UTF-8 text."
                raise unreadable(name, f"line {number + line.count(CR, 0, nul)} has a NUL byte. {advice}")
            number, offset = number + 1 + line[:-2].count(CR), offset + len(line)
            if size and offset >= size:
                return


def _diagnose(file: Path, name: str, kind: str, error: Exception, row: int = 0) -> InputError:
    """The error for a table that a reader failed on: a slow pass over its bytes, then over its cells, finds the line."""
    if kind == "parquet":
        after = f"after row {row}: " if row else ""
        return unreadable(name, f"{after}cut or not Parquet ({error}). Copy or write it anew.")
    check_text(file, name)
    csv.field_size_limit(1 << 30)
    with contextlib.suppress(csv.Error), file.open(encoding="utf-8-sig", newline="") as text:
        width, start, rows = 0, 1, csv.reader(text, delimiter=DELIMITERS[kind])
        for cells in rows:
            width = width or len(cells)
            if cells and len(cells) != width:
                quote = " Maybe a quote is not closed." if rows.line_num > start else ""
                advice = 'Cells that hold the separator or a line end must be quoted ("...").'
                return unreadable(name, f"line {start} has {len(cells)} cells, the header {width}.{quote} {advice}")
            start = rows.line_num + 1
    return unreadable(name, f"not a readable {kind} file ({error}). Maybe a quote is not closed.")
