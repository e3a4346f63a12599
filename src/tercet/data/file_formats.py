"""Read text, CSV, JSON and Parquet files in chunks of rows: a format is one function."""

import codecs
import csv
import json
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tercet.data.columns import Chunk, is_blank, plain_schema
from tercet.errors import InputError, require

ROWS = 16_384  # rows of a chunk
CELL = 1 << 24  # characters of the longest cell of CSV
LINE = 1 << 29  # characters of the longest line, which may be a whole list of JSON
LEVELS = 64  # of lists and objects in an object of JSON: libraries read deeper ones until the stack overflows
LINE_END = re.compile(rb"\r\n?|\n")
NOT_QUOTED = re.compile(r'\s+"[^"]*')
SEPARATORS = "A .csv file is cut by commas, a .tsv file by tabs: save it so, or rename it."
TABS = "A cell cannot hold a tab, not even in quotes."
QUOTES = 'Double a quote inside of a quoted cell (""), or save the table as .jsonl or .parquet, where a cell may hold any text.'
MAGIC = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"PAR1": "parquet", b"%PDF": "PDF"}
MAGIC |= dict.fromkeys((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE), "UTF-16")
Opened = tuple[pa.Schema, Iterator[Chunk]]


class Format(NamedTuple):
    """A format of files, called ``kind``.

    ``open`` takes a file, its name in messages, the columns to read, and those of them that must hold text. It returns the
    schema of all columns, from the start of the file alone, and the rows. An object of JSON may lack any of ``columns``.
    """

    kind: str
    open: Callable[[Path, str, Sequence[str], Sequence[str]], Opened]


def _open_parquet(file: Path, name: str, columns: Sequence[str], texts: Sequence[str]) -> Opened:
    try:
        parquet = pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(name, "Parquet", error) from error
    return plain_schema(parquet.schema_arrow), number_rows(name, "Parquet", parquet.iter_batches(ROWS, columns=list(columns)))


def _open_text(file: Path, name: str, columns: Sequence[str], texts: Sequence[str]) -> Opened:
    """The column ``text``, one row a line; blank lines are skipped and counted."""

    def chunks() -> Iterator[Chunk]:
        number = 1
        for lines in _blocks(read_lines(file, name)):
            cells = pa.array(lines, pa.string())
            keep = ~np.asarray(is_blank(cells))
            table = pa.table({"text": cells.filter(pa.array(keep))})
            yield Chunk(name, "line", (number + np.flatnonzero(keep)).tolist(), table, blank=len(lines) - len(table))
            number += len(lines)

    next(read_lines(file, name))  # raises InputError if it is no text
    return _text_schema(["text"]), chunks()


def _open_delimited(delimiter: str, file: Path, name: str, columns: Sequence[str], texts: Sequence[str]) -> Opened:
    """CSV or TSV: a cell is text, also "NA" and "1.50"."""
    rows = _read_cells(file, name, delimiter)
    header = next(rows, [])
    if len(header) == 1 and (found := re.search(r"[;\t|,]", header[0])):
        raise InputError(f"{name}: line 1, {header[0]!r}, seems to be cut by {found[0]!r}. {SEPARATORS}")
    if delimiter == "\t" and (quoted := [cell for cell in header if len(cell) > 1 and cell[0] == cell[-1] == '"']):
        raise InputError(f"{name}: line 1 has {quoted[0]}, but a .tsv file has no quotes around its cells. Save it as .csv.")
    places = [(column, header.index(column)) for column in columns if column in header]
    tables = (pa.table({c: pa.array([row[i] for row in block], pa.string()) for c, i in places}) for block in _blocks(rows))
    return _text_schema(header), number_rows(name, "readable", tables)


def _read_cells(file: Path, name: str, delimiter: str) -> Iterator[list[str]]:
    """The cells of each row, the header first, all of its length; blank lines are skipped.

    TSV has no quotes: a line is a row. In CSV a quoted cell may hold separators or line ends, not both; in a file of one column
    no line ends. So a quote that is not closed is always found: what it takes up to the next one holds both, or the row has a
    wrong number of cells.
    """
    csv.field_size_limit(CELL)
    quoting: Any = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    header: list[str] = []
    start, rows = 1, csv.reader(read_lines(file, name), delimiter=delimiter, quoting=quoting, strict=True)
    try:
        for cells in rows:
            header = header or cells
            if rows.line_num > start:
                _check_line_ends(cells, delimiter, f"{name}: line", start)
            if cells and len(cells) != len(header):
                advice = 'Cells that hold the separator or a line end must be quoted ("...").' if delimiter == "," else TABS
                if mark := next((mark for mark in ";|\t" if delimiter == "," and any(mark in cell for cell in header)), ""):
                    advice = f"The columns seem to be cut by {mark!r}. {SEPARATORS}"
                raise InputError(f"{name}: line {start} has {len(cells)} cells, the header {len(header)}. {advice}")
            if delimiter != "\t" and (loose := next(filter(NOT_QUOTED.fullmatch, cells), None)):
                fault = f"the cell {loose[:40]!r} begins with a space and a quote, which is not closed"
                advice = "A quote counts right after the separator only: remove the space."
                raise InputError(f"{name}: line {start}: {fault}. {advice}")
            if cells:
                yield cells
            start = rows.line_num + 1
    except csv.Error as error:
        fault = f"a quoted cell is not closed, or goes on after the closing quote in line {rows.line_num}"
        raise InputError(f"{name}: line {start}: {fault} ({error}). {QUOTES}") from error


def _check_line_ends(cells: list[str], delimiter: str, place: str, line: int) -> None:
    """Raise ``InputError`` if a cell of the row that begins in ``line`` may have taken up the rows after it."""
    for cell in cells:
        ends = len(LINE_END.findall(cell.encode()))
        if ends and (delimiter in cell or len(cells) == 1):
            what = "line ends in a file of one column" if len(cells) == 1 else "separators and line ends"
            raise InputError(f"{place} {line}: the cell with a quote here holds {what}: it may not be closed. {QUOTES}")
        line += ends


def _open_json(file: Path, name: str, columns: Sequence[str], texts: Sequence[str]) -> Opened:
    """An object a line, or one list of objects. A cell that an object lacks is null.

    Cells of one column may be of several types, which pyarrow's reader refuses.
    """

    def objects() -> Iterator[tuple[int, dict[str, Any]]]:
        for number, row in rows:
            if not isinstance(row, dict):
                raise InputError(f"{name}: {unit} {number} is a JSON {type(row).__name__}, not an object.")
            if not _is_shallow(row):
                raise InputError(f"{name}: {unit} {number} has values in more than {LEVELS} levels of lists and objects.")
            yield number, row

    def chunk(block: list[tuple[int, dict[str, Any]]]) -> Chunk:
        cells = {column: [row.get(column) for _, row in block] for column in columns}
        odd = [(text, np.array([not isinstance(value, str | None) for value in cells[text]])) for text in texts]
        cells |= {text: [value if isinstance(value, str) else None for value in cells[text]] for text in texts}
        numbers = [number for number, _ in block]
        table = {column: _json_column(values, numbers, f"{name}: {unit}", column) for column, values in cells.items()}
        return Chunk(name, unit, numbers, pa.table(table), odd)

    lines = ((number, line.strip()) for number, line in enumerate(read_lines(file, name), 1) if line.strip())
    unit, rows = "line", ((number, _parse(line, name, number)) for number, line in lines)
    if next((line for line in read_lines(file, name) if line.strip()), "").lstrip().startswith("["):
        unit, rows = "row", (row for row in enumerate(_parse(read_text(file, name), name, 1), 1))
    blocks = _blocks(objects())
    first = next(blocks, [])
    names = dict.fromkeys(key for _, row in first for key in row)
    return _text_schema(names), map(chunk, chain(filter(None, [first]), blocks))


def _is_shallow(row: Any) -> bool:
    inside = [row]
    for _ in range(LEVELS):
        nested = [value for value in inside if isinstance(value, dict | list)]
        if not nested:
            return True
        inside = [inner for value in nested for inner in (value.values() if isinstance(value, dict) else value)]
    return False


def _json_column(values: list[Any], numbers: list[int], place: str, column: str) -> pa.Array:
    def fault(count: int) -> Exception | None:
        try:
            pa.array(values[:count])
        except (pa.ArrowException, UnicodeEncodeError, OverflowError) as error:
            return error
        return None

    if (error := fault(len(values))) is not None:
        at = bisect_left(range(len(values)), True, key=lambda i: fault(i + 1) is not None)
        accepted = "A column holds text, or whole numbers of 64 bits, or fractions."
        raise InputError(f"{place} {numbers[at]}: column '{column}' cannot be read ({error}). {accepted}")
    return pa.array(values)


def _parse(text: str, name: str, line: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # of other kinds: a number of thousands of digits, endless brackets
        place, reason = line + getattr(error, "lineno", 1) - 1, getattr(error, "msg", error)
        advice = "Each line must be one whole object, or the file a list of objects."
        raise InputError(f"{name}: line {place} is cut or not JSON ({reason}). {advice}") from None


JSON = Format("json", _open_json)
FORMATS = {".txt": Format("txt", _open_text), ".csv": Format("csv", partial(_open_delimited, ",")),
           ".tsv": Format("tsv", partial(_open_delimited, "\t")), ".parquet": Format("parquet", _open_parquet),
           ".json": JSON, ".jsonl": JSON, ".ndjson": JSON}  # fmt: skip


def _text_schema(names: Iterable[str]) -> pa.Schema:
    return pa.schema([(name, pa.string()) for name in names])


def _blocks(rows: Iterator[Any]) -> Iterator[list[Any]]:
    """Lists of at most ``ROWS`` rows."""
    return iter(lambda: list(islice(rows, ROWS)), [])


def number_rows(name: str, what: str, tables: Iterable[Any]) -> Iterator[Chunk]:
    """Tables in order, their rows numbered from 1; ``InputError`` that they are not ``what`` where reading them fails."""
    count = 0
    try:
        for rows in tables:
            table = pa.table(rows).cast(plain_schema(rows.schema))
            table.validate(full=True)  # of a damaged file: text that is no UTF-8, places outside of the data
            yield Chunk(name, "row", range(count + 1, count + 1 + len(rows)), table)
            count += len(rows)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(name, what, error, count) from error


def _unreadable(name: str, what: str, error: Exception, count: int = 0) -> InputError:
    after, reason = f"after row {count}: " if count else "", " ".join(str(error).split())
    return InputError(f"{name}: {after}cut or not {what} ({reason}). Copy or write it anew.")


def read_lines(file: Path, name: str) -> Iterator[str]:
    r"""The lines of a file in UTF-8 with their ends, ``\n``, ``\r\n`` or ``\r``."""
    with file.open("rb") as stream:
        start = stream.read(8)
    kind = "".join(kind for magic, kind in MAGIC.items() if start.startswith(magic))
    require(not kind, f"{name}: line 1, byte 0: this is {kind} data, not UTF-8. Unpack it or save it as UTF-8.")
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:
            for line in iter(partial(text.readline, LINE + 1), ""):
                if "\0" in line:
                    raise UnicodeError
                if len(line) > LINE:
                    raise InputError(f"{name}: a line has more than {LINE:,} characters.")
                yield line
    except UnicodeError as error:
        raise _not_utf8(file, name) from error


def _not_utf8(file: Path, name: str) -> InputError:
    """The error for the first byte of a file that is NUL or not UTF-8."""
    number, offset = 1, 0
    with file.open("rb") as stream:
        for part in stream:
            at, fault = part.find(b"\0"), " has a NUL byte. Maybe the file is UTF-16 or binary: save it as UTF-8 text."
            try:
                part.decode()
            except UnicodeDecodeError as error:
                if not 0 <= at < error.start:
                    at = error.start
                    # Windows has letters, as curly quotes, where Latin-1 has control characters. Of UTF-8 they are parts.
                    rests = (rest.decode(errors="surrogateescape") for rest in chain([part], stream))
                    code = "cp1252" if any(re.search("[\udc80-\udc9f]", rest) for rest in rests) else "latin1"
                    advice = f"Save the file as UTF-8 (for example: iconv -f {code} -t utf-8)."
                    fault = f", byte {offset + at} (0x{part[at]:02x}) is not UTF-8. {advice}"
            if at >= 0:
                break
            number, offset = number + len(LINE_END.findall(part)), offset + len(part)
    return InputError(f"{name}: line {number + len(LINE_END.findall(part, 0, at))}{fault}")


def read_text(file: Path, name: str) -> str:
    r"""A whole file of UTF-8; lines end with ``\n``."""
    return "\n".join(line.rstrip("\r\n") for line in read_lines(file, name))
