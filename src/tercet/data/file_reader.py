"""Read txt, csv, tsv, JSON Lines and Parquet files, and hub data sets, in chunks."""

import contextlib
import csv
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from tercet.data.columns import Chunk, check_column, unreadable
from tercet.data.paths import ACCEPTED, DataPath, check_reachable
from tercet.errors import InputError

ROWS = 65_536  # per piece: enough to make the work per row vanish, few enough to stream


BLOCK = 1 << 22
MAGIC = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PAR1": "parquet",
    b"%PDF": "PDF",
}


def lines(file: Path, place: str) -> Iterator[tuple[int, list[str]]]:
    r"""Blocks of ``(number of the first line, lines)``; lines end at ``\n``, ``\r\n`` or ``\r`` and nowhere else.

    Raises:
        InputError: the file is empty, packed, not UTF-8, or has NUL bytes.
    """
    number, offset, rest = 1, 0, b""
    with file.open("rb") as stream:
        while block := stream.read(max(BLOCK, len(rest))):
            if offset == 0 and not rest:
                _magic(block, place)
            block = rest + block
            # Cut after a line end, never between \r and \n.
            cut = max(block.rfind(b"\n"), block.rfind(b"\r", 0, -1)) + 1
            block, rest = block[:cut], block[cut:]
            if block:
                found = _split(block, offset, number, place)
                yield number, found[:-1]
                number, offset = number + len(found) - 1, offset + len(block)
    if rest:
        found = _split(rest, offset, number, place)
        yield number, found if found[-1] else found[:-1]
    elif offset == 0:
        raise unreadable(place, "the file is empty.")


def read_text(file: Path, place: str) -> Iterator[Chunk]:
    """The one column ``text``: a line is a row; blank lines separate and are counted."""
    for first, block in lines(file, place):
        kept = [(first + i, line) for i, line in enumerate(block) if line and not line.isspace()]
        table = pa.table({"text": pa.array([line for _, line in kept], pa.string())})
        numbers = pa.array([number for number, _ in kept], pa.int64())
        yield Chunk(place, "line", numbers, table, blank=len(block) - len(kept))


def check_bytes(file: Path, place: str, blocks: int | None = None) -> None:
    """Read the file's first ``blocks`` (null: all) as lines, for the errors that this may raise."""
    for i, _ in enumerate(lines(file, place), start=1):
        if i == blocks:
            return


def _split(block: bytes, offset: int, number: int, place: str) -> list[str]:
    try:
        # utf-8-sig would eat a mark in the middle of the file too: only the first block may have one.
        text = block.decode("utf-8-sig" if offset == 0 else "utf-8")
    except UnicodeDecodeError as error:
        line = number + block.count(b"\n", 0, error.start)
        raise unreadable(
            place,
            f"line {line}, byte {offset + error.start} (0x{block[error.start]:02x}) is not UTF-8. "
            "Save the file as UTF-8 (for example: iconv -f latin1 -t utf-8).",
        ) from None
    if "\0" in text:
        line = number + text.count("\n", 0, text.index("\0"))
        raise unreadable(place, f"line {line} has a NUL byte. Maybe the file is UTF-16 or binary: save it as UTF-8 text.")
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _magic(block: bytes, place: str) -> None:
    for magic, name in MAGIC.items():
        if block.startswith(magic):
            raise unreadable(place, f"byte 0: this is {name} data under another name. Unpack or convert it to UTF-8 text.")
    if block.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise unreadable(place, "line 1, byte 0: the file is UTF-16, not UTF-8. Save it as UTF-8.")


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


def read_csv(file: Path, place: str, kind: str, columns: Sequence[str]) -> Iterator[Chunk]:
    """The named columns; rows are counted without the header."""
    reader, start = csv_reader(file, place, kind, columns), 1
    while True:
        try:
            table = pa.Table.from_batches([reader.read_next_batch()])
        except StopIteration:
            return
        except pa.ArrowInvalid as error:
            raise _broken_csv(file, place, kind, error) from error
        yield Chunk(place, "row", _count(start, table), table)
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
                return unreadable(
                    place,
                    f"line {start} has {len(row)} cells, the header {width}.{quote} "
                    'Cells that hold the separator or a line end must be quoted ("...").',
                )
            start = rows.line_num + 1
    return unreadable(place, f"not a readable {kind} file ({error}). Maybe a quote is not closed.")


def read_json(file: Path, place: str, columns: Sequence[str], texts: Sequence[str]) -> Iterator[Chunk]:
    """An object a line, or one list of objects. A column that an object lacks is null."""
    for unit, numbers, objects in json_objects(file, place):
        odd = pa.array([any(not isinstance(o.get(c, ""), str | None) for c in texts) for o in objects], pa.bool_())
        cells = {name: _json_column(objects, name, name in texts, place) for name in columns}
        yield Chunk(place, unit, pa.array(numbers, pa.int64()), pa.table(cells), odd)


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
        raise unreadable(place, f"line {error.lineno}: {error.msg}. The file is cut or not JSON.") from None
    for i, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise unreadable(place, f"row {i} is a JSON {type(row).__name__}, not an object.")
    return list(range(1, len(rows) + 1)), rows


def _object(line: str, number: int, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise unreadable(place, f"line {number} is not JSON ({error.msg}). Each line must be one whole object.") from None
    if not isinstance(row, dict):
        raise unreadable(place, f"line {number} is a JSON {type(row).__name__}. Each line must be one whole object.")
    return row


def _json_column(objects: list[dict[str, Any]], name: str, text: bool, place: str) -> pa.Array:
    cells = [row.get(name) for row in objects]
    if text:
        cells = [cell if isinstance(cell, str) else None for cell in cells]
    try:
        return pa.array(cells)
    except (pa.ArrowException, UnicodeEncodeError) as error:
        raise unreadable(place, f"column '{name}' cannot be read ({error}).") from error


def read_parquet(file: Path, place: str, columns: Sequence[str]) -> Iterator[Chunk]:
    """The named columns."""
    start = 1
    try:
        for batch in pq.ParquetFile(file).iter_batches(ROWS, columns=list(columns)):
            table = pa.Table.from_batches([batch])
            yield Chunk(place, "row", _count(start, table), table)
            start += len(table)
    except (pa.ArrowException, OSError) as error:
        raise unreadable(place, f"after row {start - 1}: cut or not Parquet ({error}). Copy or write it anew.") from error


def _count(start: int, table: pa.Table) -> pa.Array:
    return pa.array(np.arange(start, start + len(table), dtype=np.int64))


def open_hub(path: str, streaming: bool) -> Any:
    """``owner/name[:config[:split]]``, split ``train`` unless named.

    Raises:
        InputError: the hub cannot be reached or has no such data set, config or split.
    """
    name, config, split = (*path.split(":"), None, None)[:3]
    if not datasets.config.HF_HUB_OFFLINE:
        check_reachable(path, str(name))
    try:
        return datasets.load_dataset(name, config, split=split or "train", streaming=streaming)
    except Exception as error:  # the libraries below raise dozens of kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"data.path={path}: no such file or folder here, and the hub gave none: {reason} "
            f"data.path takes {ACCEPTED}; a hub id may go on with :config and :split."
        ) from error


def read_hub(path: str, columns: Sequence[str], streaming: bool) -> Iterator[Chunk]:
    """The named columns of the data set."""
    start = 1
    rows = open_hub(path, streaming).select_columns(list(columns)).with_format("arrow")
    for table in rows.iter(ROWS):
        numbers = pa.array(np.arange(start, start + len(table), dtype=np.int64))
        yield Chunk(f"data.path={path}", "row", numbers, table)
        start += len(table)


def column_names(place: DataPath, file: int = 0) -> list[str]:
    """The columns, from the head of one file alone; of JSON those of its first objects."""
    if place.kind == "hub":
        return list(open_hub(place.path, streaming=True).column_names)
    path, name = place.files[file], _name(place, file)
    if path.stat().st_size == 0:
        raise unreadable(name, "the file is empty.")
    if place.kind == "txt":
        check_bytes(path, name, blocks=1)
        return ["text"]
    names = _table_columns(place.kind, path, name)
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise unreadable(name, f"the column {', '.join(twice)} is there twice. Rename one of them.")
    return names


def read_chunks(place: DataPath, texts: Sequence[str], others: Sequence[str], streaming: bool) -> Iterator[Chunk]:
    """The text columns and the ``others`` of all files, in order."""
    columns = list(dict.fromkeys((*texts, *others)))
    if place.kind == "hub":
        yield from read_hub(place.path, columns, streaming)
        return
    for i, file in enumerate(place.files):
        name, available = _name(place, i), column_names(place, i)
        if place.kind != "json":  # an object may lack a column: that is an empty cell
            for column in columns:
                check_column(name.removeprefix("data.path="), available, column, "data.columns")
        if place.kind == "txt":
            yield from read_text(file, name)
        elif place.kind == "json":
            yield from read_json(file, name, columns, texts)
        elif place.kind == "parquet":
            yield from read_parquet(file, name, columns)
        else:
            yield from read_csv(file, name, place.kind, columns)


def _name(place: DataPath, file: int) -> str:
    path = place.files[file]
    inside = "" if len(place.files) == 1 else f", file {path.name}"
    return f"data.path={place.path}{inside}"


def _table_columns(kind: str, path: Path, name: str) -> list[str]:
    if kind == "parquet":
        try:
            return list(pq.read_schema(path).names)
        except (pa.ArrowException, OSError) as error:
            raise unreadable(name, f"cut or not Parquet ({error}). Copy or write it anew.") from error
    if kind == "json":
        blocks = json_objects(path, name)
        return list(dict.fromkeys(key for _, _, rows in itertools.islice(blocks, 1) for row in rows for key in row))
    names = list(csv_reader(path, name, kind).schema.names)
    if len(names) == 1 and (found := [mark for mark in (";", "\t", "|", ",") if mark in names[0]]):
        raise unreadable(
            name,
            f"line 1, {names[0]!r}, seems to be cut by {found[0]!r}. A .csv file is cut by commas, a .tsv file by tabs.",
        )
    return names
