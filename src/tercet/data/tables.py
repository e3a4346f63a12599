"""CSV, JSON Lines and Parquet to pieces."""

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

from tercet.data.piece import ROWS, Piece, broken
from tercet.data.plain import check_bytes, lines
from tercet.error import InputError

CSV_BLOCK = 1 << 24
DELIMITER = {"csv": ",", "tsv": "\t"}


def csv_reader(file: Path, place: str, kind: str, columns: Sequence[str] = ()) -> Any:
    """An open reader in which every cell is text: the word "NA" is a sentence like any other."""
    check_bytes(file, place, blocks=1)
    try:
        return pyarrow.csv.open_csv(
            file,
            read_options=pyarrow.csv.ReadOptions(block_size=CSV_BLOCK),
            parse_options=pyarrow.csv.ParseOptions(delimiter=DELIMITER[kind], newlines_in_values=True),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types=dict.fromkeys(columns, pa.string()), include_columns=columns, strings_can_be_null=False
            ),
        )
    except pa.ArrowInvalid as error:
        raise _broken_csv(file, place, kind, error) from error


def read_csv(file: Path, place: str, kind: str, columns: Sequence[str]) -> Iterator[Piece]:
    """The named columns; rows are counted without the header."""
    reader, start = csv_reader(file, place, kind, columns), 1
    while True:
        try:
            table = pa.Table.from_batches([reader.read_next_batch()])
        except StopIteration:
            return
        except pa.ArrowInvalid as error:
            raise _broken_csv(file, place, kind, error) from error
        yield Piece(place, "row", _count(start, table), table)
        start += len(table)


def _broken_csv(file: Path, place: str, kind: str, error: Exception) -> InputError:
    """The first line that is at fault, found by a slower reader that counts lines."""
    check_bytes(file, place)
    csv.field_size_limit(1 << 30)
    with contextlib.suppress(csv.Error), file.open(encoding="utf-8-sig", newline="") as stream:
        rows, width, start = csv.reader(stream, delimiter=DELIMITER[kind]), 0, 1
        for row in rows:
            width = width or len(row)
            if row and len(row) != width:
                quote = " Maybe a quote is not closed." if rows.line_num > start else ""
                return broken(
                    place,
                    f"line {start} has {len(row)} cells, the header {width}.{quote} "
                    'Cells that hold the separator or a line end must be quoted ("...").',
                )
            start = rows.line_num + 1
    return broken(place, f"not a readable {kind} file ({error}). Maybe a quote is not closed.")


def read_json(file: Path, place: str, columns: Sequence[str], texts: Sequence[str]) -> Iterator[Piece]:
    """An object a line, or one list of objects. A column that an object lacks is null."""
    for unit, numbers, objects in json_objects(file, place):
        odd = pa.array([any(not isinstance(o.get(c, ""), str | None) for c in texts) for o in objects], pa.bool_())
        cells = {name: _json_column(objects, name, name in texts, place) for name in columns}
        yield Piece(place, unit, pa.array(numbers, pa.int64()), pa.table(cells), odd)


def json_objects(file: Path, place: str) -> Iterator[tuple[str, list[int], list[dict[str, Any]]]]:
    """Blocks of ``(line or row, numbers, objects)``."""
    for first, block in lines(file, place):
        if first == 1 and next((line for line in block if line.strip()), "").lstrip().startswith("["):
            yield "row", *_json_list(file, place)
            return
        found = [(first + i, _object(line, first + i, place)) for i, line in enumerate(block) if line.strip()]
        yield "line", [number for number, _ in found], [item for _, item in found]


def _json_list(file: Path, place: str) -> tuple[list[int], list[dict[str, Any]]]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise broken(place, f"line {error.lineno}: {error.msg}. The file is cut or not JSON.") from None
    for i, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise broken(place, f"row {i} is a JSON {type(row).__name__}, not an object.")
    return list(range(1, len(rows) + 1)), rows


def _object(line: str, number: int, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise broken(place, f"line {number} is not JSON ({error.msg}). Each line must be one whole object.") from None
    if not isinstance(row, dict):
        raise broken(place, f"line {number} is a JSON {type(row).__name__}. Each line must be one whole object.")
    return row


def _json_column(objects: list[dict[str, Any]], name: str, text: bool, place: str) -> pa.Array:
    cells = [row.get(name) for row in objects]
    if text:
        cells = [cell if isinstance(cell, str) else None for cell in cells]
    try:
        return pa.array(cells)
    except (pa.ArrowException, UnicodeEncodeError) as error:
        raise broken(place, f"column '{name}' cannot be read ({error}).") from error


def read_parquet(file: Path, place: str, columns: Sequence[str]) -> Iterator[Piece]:
    """The named columns."""
    start = 1
    try:
        for batch in pq.ParquetFile(file).iter_batches(ROWS, columns=list(columns)):
            table = pa.Table.from_batches([batch])
            yield Piece(place, "row", _count(start, table), table)
            start += len(table)
    except (pa.ArrowException, OSError) as error:
        raise broken(place, f"after row {start - 1}: cut or not Parquet ({error}). Copy or write it anew.") from error


def _count(start: int, table: pa.Table) -> pa.Array:
    return pa.array(np.arange(start, start + len(table), dtype=np.int64))
