"""Find and read text, CSV, JSON and Parquet files, and data sets of the hub, in chunks of rows."""

import codecs
import csv
import difflib
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import hf_hub_download

from tercet.data.columns import Chunk, check_column, files_fingerprint, plain_columns, text_fingerprint
from tercet.errors import InputError, require
from tercet.paths import locate

PREFIX = "hf://datasets/"
TIMEOUT = 5.0  # seconds
ARCHIVES = {".gz", ".zip", ".bz2", ".xz", ".zst", ".7z", ".tar", ".tgz", ".rar"}
ACCEPTED = "a .txt, .csv, .tsv, .jsonl, .json or .parquet file, a folder of one of these, or a hub id (owner/name)"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+){0,2}")
ROWS = 16_384  # rows of a chunk
LINE_END = re.compile(rb"\r\n?|\n")
ADVICE = "Save the file as UTF-8 (for example: iconv -f latin1 -t utf-8)."
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


class DataPath(NamedTuple):
    """The ``files`` that ``path`` names, in order, of one format; a data set of the hub has none."""

    path: str
    format: Format
    files: tuple[Path, ...] = ()

    def schema(self) -> pa.Schema:
        """The columns, from the start of the first file alone; of JSON those of its first objects."""
        return next(self._open((), ()))[1]

    def chunks(self, texts: Sequence[str], others: Sequence[str]) -> Iterator[Chunk]:
        """Read the text columns and ``others`` of all files, in order."""
        columns = list(dict.fromkeys((*texts, *others)))
        for name, schema, chunks in self._open(columns, texts):
            for column in columns if self.format is not JSON else ():
                check_column(name, schema.names, column, "columns")
            yield from chunks

    def _open(self, columns: Sequence[str], texts: Sequence[str]) -> Iterator[tuple[str, pa.Schema, Iterator[Chunk]]]:
        for file in self.files or (Path(self.path),):
            name = self.describe(file)
            require(not file.is_file() or file.stat().st_size, f"{name}: the file is empty.")
            schema, chunks = self.format.open(file, name, columns, texts)
            twice = ", ".join(sorted({n for n in schema.names if schema.names.count(n) > 1}))
            require(not twice, f"{name}: the column {twice} is there twice. Rename one of them.")
            yield name, schema, chunks

    def describe(self, file: Path) -> str:
        """The start of messages about a file."""
        return f"`path`={self.path}" + ("" if len(self.files) < 2 else f", file {file.name}")

    def fingerprint(self, options: Sequence[Any], whole: bool = True) -> str:
        """Hash the options and the files' contents, with ``whole`` false their sizes and ends, but not where they are."""
        files = files_fingerprint(self.format.kind, self.files, whole)
        return text_fingerprint(repr((*options, "" if self.files else self.path)), files)


def resolve(path: str, streaming: bool = False) -> DataPath:
    """Find the files that a path names: relative to the working directory, to ``TERCET_DATA``, or on the hub.

    With ``streaming`` a hub's data set is not downloaded as a whole.
    """
    here = _download(path) if path.startswith(PREFIX) else locate(path)
    suffix = here.suffix.lower()
    if here.is_dir():
        return _folder(path, here)
    if not here.exists():
        # A path into an existing folder, or with a known ending, names a missing file, not a data set of the hub.
        folders = list(dict.fromkeys(p.parent.absolute() for p in (Path(path).expanduser(), here) if p.parent.is_dir()))
        if HUB_ID.fullmatch(path) and suffix not in {*FORMATS, *ARCHIVES} and not folders:
            return DataPath(path, Format("hub", partial(_open_hub, streaming)))
        raise InputError(f"`path`={path} does not exist.{_describe_folders(here.name, folders)} `path` takes {ACCEPTED}.")
    require(os.access(here, os.R_OK), f"`path`={path} may not be read by this user: change its permissions.")
    require(suffix not in ARCHIVES, f"`path`={path} is packed ({suffix}). Unpack it first; `path` takes {ACCEPTED}.")
    got = f"a '{suffix}' file" if suffix else "a file without an ending"
    require(suffix in FORMATS, f"`path`={path} is {got}. `path` takes {ACCEPTED}.")
    return DataPath(path, FORMATS[suffix], (here,))


def _describe_folders(name: str, folders: list[Path]) -> str:
    """Where a missing file was looked for, and which names there are similar."""
    if not folders:
        return " Its folder does not exist either."
    entries = [entry for folder in folders for entry in sorted(folder.iterdir()) if not entry.name.startswith(".")]
    names = [entry.name for entry in entries if entry.suffix.lower() in FORMATS or entry.is_dir()]
    near = ", ".join(difflib.get_close_matches(name, names, n=3))
    content = f", which holds {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}" if names else ""
    return f" Looked in {' and '.join(map(str, folders))}{f'; near: {near}' if near else content}."


def _folder(path: str, folder: Path) -> DataPath:
    names = {file: file.relative_to(folder).as_posix() for file in sorted(visible_files(folder), key=Path.as_posix)}
    some = ", ".join(islice(names.values(), 8))
    files = tuple(file for file in names if file.suffix.lower() in FORMATS)
    require(files, f"`path`={path}: the folder {f'holds {some}' if some else 'is empty'}. `path` takes {ACCEPTED}.")
    first: dict[Format, str] = {}
    for file in files:
        first.setdefault(FORMATS[file.suffix.lower()], names[file])
    mixed = ", ".join(f"{file_format.kind}: {name}" for file_format, name in first.items())
    advice = "Name one file, or a folder whose files are all of one kind, in `path`."
    require(len(first) == 1, f"`path`={path}: the folder mixes kinds ({mixed}). {advice}")
    return DataPath(path, next(iter(first)), files)


def visible_files(folder: Path) -> list[Path]:
    """All files below a folder but those with a name, or in a folder, that starts with a dot."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]


def _download(path: str) -> Path:
    """The copy of ``hf://datasets/owner/name/file`` in the hub's cache, downloaded once."""
    owner, name, file = (*path.removeprefix(PREFIX).split("/", 2), "", "")[:3]
    require(file, f"`path`={path}: {PREFIX}owner/name/file is needed.")
    return Path(_load(path, f"{owner}/{name}", lambda: hf_hub_download(f"{owner}/{name}", file, repo_type="dataset")))


def open_hub(path: str, streaming: bool) -> Any:
    """Load the data set ``owner/name[:config[:split]]``; the split is ``train`` by default."""
    name, config, split = (*path.split(":"), "", "")[:3]
    options = {"split": split or "train", "streaming": streaming}
    return _load(path, name, lambda: datasets.load_dataset(name, config or None, **options))


def _load(path: str, name: str, load: Callable[[], Any]) -> Any:
    """Load a data set; first ask for it once with a short time limit, since the libraries retry for minutes."""
    here = f"`path`={path}: no such file or folder here, and the hub"
    if not datasets.config.HF_HUB_OFFLINE:
        request = urllib.request.Request(f"{datasets.config.HF_ENDPOINT}/api/datasets/{name}", method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=TIMEOUT).close()
        except urllib.error.HTTPError:
            pass  # the hub answers: the library says what is wrong
        except OSError as error:
            advice = "a local file or folder, or HF_HUB_OFFLINE=1 to use a copy that was downloaded before"
            raise InputError(f"{here} cannot be reached ({error}). Set `path` to {advice}.") from error
    try:
        return load()
    except Exception as error:  # the libraries raise dozens of kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        accepted = f"`path` takes {ACCEPTED}; a hub id may go on with :config and :split."
        raise InputError(f"{here} gave none: {reason} {accepted}") from error


def _open_hub(streaming: bool, file: Path, name: str, columns: Sequence[str], texts: Sequence[str]) -> Opened:
    rows = open_hub(str(file), streaming or not columns)
    batches = rows.select_columns(list(columns)).with_format("arrow").iter(ROWS)
    return rows.features.arrow_schema, _number_rows(name, "readable", batches)


def _open_parquet(file: Path, name: str, columns: Sequence[str], texts: Sequence[str]) -> Opened:
    try:
        parquet = pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(name, "Parquet", error) from error
    return parquet.schema_arrow, _number_rows(name, "Parquet", parquet.iter_batches(ROWS, columns=list(columns)))


def _open_text(file: Path, name: str, columns: Sequence[str], texts: Sequence[str]) -> Opened:
    """The column ``text``, one row a line; blank lines are skipped and counted."""

    def chunks() -> Iterator[Chunk]:
        for lines in _blocks(enumerate(read_lines(file, name), 1)):
            rows = {number: line for number, line in lines if line.strip()}
            table = pa.table({"text": pa.array(rows.values(), pa.string())})
            yield Chunk(name, "line", list(rows), table, blank=len(lines) - len(rows))

    next(read_lines(file, name))  # raises InputError if it is no text
    return _text_schema(["text"]), chunks()


def _open_delimited(delimiter: str, file: Path, name: str, columns: Sequence[str], texts: Sequence[str]) -> Opened:
    """CSV or TSV: a cell is text, also "NA" and "1.50"."""
    rows = _read_cells(file, name, delimiter)
    header = next(rows, [])
    if len(header) == 1 and (found := re.search(r"[;\t|,]", header[0])):
        advice = "A .csv file is cut by commas, a .tsv file by tabs."
        raise InputError(f"{name}: line 1, {header[0]!r}, seems to be cut by {found[0]!r}. {advice}")
    places = [(column, header.index(column)) for column in columns if column in header]
    tables = (pa.table({c: pa.array([row[i] for row in block], pa.string()) for c, i in places}) for block in _blocks(rows))
    return _text_schema(header), _number_rows(name, "readable", tables)


def _read_cells(file: Path, name: str, delimiter: str) -> Iterator[list[str]]:
    """The cells of each row, the header first, all of its length; blank lines are skipped."""
    csv.field_size_limit(1 << 30)
    width, start, rows = 0, 1, csv.reader(read_lines(file, name), delimiter=delimiter)
    for cells in rows:
        width = width or len(cells)
        if cells and len(cells) != width:
            quote = " Maybe a quote is not closed." if rows.line_num > start else ""
            advice = 'Cells that hold the separator or a line end must be quoted ("...").'
            raise InputError(f"{name}: line {start} has {len(cells)} cells, the header {width}.{quote} {advice}")
        if cells:
            yield cells
        start = rows.line_num + 1


def _open_json(file: Path, name: str, columns: Sequence[str], texts: Sequence[str]) -> Opened:
    """An object a line, or one list of objects. A cell that an object lacks is null.

    Cells of one column may be of several types, which pyarrow's reader refuses.
    """

    def objects() -> Iterator[tuple[int, dict[str, Any]]]:
        for number, row in rows:
            if not isinstance(row, dict):
                raise InputError(f"{name}: {unit} {number} is a JSON {type(row).__name__}, not an object.")
            yield number, row

    def chunk(block: list[tuple[int, dict[str, Any]]]) -> Chunk:
        odd, cells = np.zeros(len(block), dtype=np.bool_), {}
        for column in columns:
            values = [row.get(column) for _, row in block]
            if column in texts:
                odd |= [not isinstance(value, str | None) for value in values]
                values = [value if isinstance(value, str) else None for value in values]
            try:
                cells[column] = pa.array(values)
            except (pa.ArrowException, UnicodeEncodeError) as error:
                raise InputError(f"{name}: column '{column}' cannot be read ({error}).") from error
        return Chunk(name, unit, [number for number, _ in block], pa.table(cells), odd)

    lines = ((number, line.strip()) for number, line in enumerate(read_lines(file, name), 1) if line.strip())
    unit, rows = "line", ((number, _parse(line, name, number)) for number, line in lines)
    if next((line for line in read_lines(file, name) if line.strip()), "").lstrip().startswith("["):
        unit, rows = "row", (row for row in enumerate(_parse(read_text(file, name), name, 1), 1))
    blocks = _blocks(objects())
    first = next(blocks, [])
    names = dict.fromkeys(key for _, row in first for key in row)
    return _text_schema(names), map(chunk, chain(filter(None, [first]), blocks))


def _parse(text: str, name: str, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place, advice = f"line {line + error.lineno - 1}", "Each line must be one whole object, or the file a list of objects."
        raise InputError(f"{name}: {place} is cut or not JSON ({error.msg}). {advice}") from None


JSON = Format("json", _open_json)
FORMATS = {".txt": Format("txt", _open_text), ".csv": Format("csv", partial(_open_delimited, ",")),
           ".tsv": Format("tsv", partial(_open_delimited, "\t")), ".parquet": Format("parquet", _open_parquet),
           ".json": JSON, ".jsonl": JSON, ".ndjson": JSON}  # fmt: skip


def _text_schema(names: Iterable[str]) -> pa.Schema:
    return pa.schema([(name, pa.string()) for name in names])


def _blocks(rows: Iterator[Any]) -> Iterator[list[Any]]:
    """Lists of at most ``ROWS`` rows."""
    return iter(lambda: list(islice(rows, ROWS)), [])


def _number_rows(name: str, what: str, tables: Iterable[Any]) -> Iterator[Chunk]:
    count = 0
    try:
        for rows in tables:
            yield Chunk(name, "row", range(count + 1, count + 1 + len(rows)), plain_columns(pa.table(rows)))
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
            for line in text:
                if "\0" in line:
                    raise UnicodeError
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
                    fault = f", byte {offset + at} (0x{part[at]:02x}) is not UTF-8. {ADVICE}"
            if at >= 0:
                break
            number, offset = number + len(LINE_END.findall(part)), offset + len(part)
    return InputError(f"{name}: line {number + len(LINE_END.findall(part, 0, at))}{fault}")


def read_text(file: Path, name: str) -> str:
    r"""A whole file of UTF-8; lines end with ``\n``."""
    return "\n".join(line.rstrip("\r\n") for line in read_lines(file, name))
