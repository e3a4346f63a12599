"""Find and read text, CSV, JSON and Parquet files, and data sets of the hub, in chunks of rows."""

import codecs
import contextlib
import csv
import difflib
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from huggingface_hub import hf_hub_download

from tercet.data.columns import Chunk, check_column
from tercet.errors import InputError, require
from tercet.paths import locate

PREFIX = "hf://datasets/"
TIMEOUT = 5.0  # seconds
KINDS = {f".{kind}": kind for kind in ("txt", "csv", "tsv", "json", "parquet")} | {".jsonl": "json", ".ndjson": "json"}
ARCHIVES = {".gz", ".zip", ".bz2", ".xz", ".zst", ".7z", ".tar", ".tgz", ".rar"}
ACCEPTED = "a .txt, .csv, .tsv, .jsonl, .json or .parquet file, a folder of one of these, or a hub id (owner/name)"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+){0,2}")
ROWS = 65_536  # rows of a chunk of Parquet or of the hub
BLOCK = 1 << 22  # bytes of a chunk of lines; the first of a file is checked before it is read as a table
CSV_BLOCK = 1 << 24  # bytes of a chunk of CSV; a row may not be longer
DELIMITERS = {"csv": ",", "tsv": "\t"}
LINE_END = re.compile(rb"\r\n?|\n")
ADVICE = "Save the file as UTF-8 (for example: iconv -f latin1 -t utf-8)."
MAGIC = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"PAR1": "parquet", b"%PDF": "PDF"}
MAGIC |= dict.fromkeys((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE), "UTF-16")


class DataPath(NamedTuple):
    """The ``files`` that ``path`` names, in order; ``kind`` is txt, csv, tsv, json, parquet, hub, or folder (of images)."""

    path: str
    kind: str
    files: tuple[Path, ...] = ()

    def describe(self, file: Path) -> str:
        """The start of messages about a file."""
        return f"`path`={self.path}" + ("" if len(self.files) < 2 else f", file {file.name}")


def resolve(path: str) -> DataPath:
    """Find the files that a path names: relative to the working directory, to ``TERCET_DATA``, or on the hub."""
    here = download(path) if path.startswith(PREFIX) else locate(path)
    suffix = here.suffix.lower()
    if here.is_dir():
        return _folder(path, here)
    if not here.exists():
        # A path into an existing folder, or with a known ending, names a missing file, not a data set of the hub.
        folders = list(dict.fromkeys(p.parent.absolute() for p in (Path(path).expanduser(), here) if p.parent.is_dir()))
        if HUB_ID.fullmatch(path) and suffix not in {*KINDS, *ARCHIVES} and not folders:
            return DataPath(path, "hub")
        raise InputError(f"`path`={path} does not exist.{_describe_folders(here.name, folders)} `path` takes {ACCEPTED}.")
    require(os.access(here, os.R_OK), f"`path`={path} may not be read by this user: change its permissions.")
    require(suffix not in ARCHIVES, f"`path`={path} is packed ({suffix}). Unpack it first; `path` takes {ACCEPTED}.")
    got = f"a '{suffix}' file" if suffix else "a file without an ending"
    require(suffix in KINDS, f"`path`={path} is {got}. `path` takes {ACCEPTED}.")
    return DataPath(path, KINDS[suffix], (here,))


def _describe_folders(name: str, folders: list[Path]) -> str:
    """Where a missing file was looked for, and which names there are similar."""
    if not folders:
        return " Its folder does not exist either."
    entries = [entry for folder in folders for entry in sorted(folder.iterdir()) if not entry.name.startswith(".")]
    names = [entry.name for entry in entries if entry.suffix.lower() in KINDS or entry.is_dir()]
    near = ", ".join(difflib.get_close_matches(name, names, n=3))
    content = f", which holds {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}" if names else ""
    return f" Looked in {' and '.join(map(str, folders))}{f'; near: {near}' if near else content}."


def _folder(path: str, folder: Path) -> DataPath:
    visible = sorted(visible_files(folder), key=Path.as_posix)
    files = tuple(file for file in visible if file.suffix.lower() in KINDS)
    names = ", ".join(file.relative_to(folder).as_posix() for file in visible[:8])
    require(files, f"`path`={path}: the folder {f'holds {names}' if names else 'is empty'}. `path` takes {ACCEPTED}.")
    examples: dict[str, str] = {}
    for file in files:
        examples.setdefault(KINDS[file.suffix.lower()], file.relative_to(folder).as_posix())
    mixed = ", ".join(f"{kind}: {name}" for kind, name in examples.items())
    advice = "Name one file, or a folder whose files are all of one kind, in `path`."
    require(len(examples) == 1, f"`path`={path}: the folder mixes kinds ({mixed}). {advice}")
    return DataPath(path, next(iter(examples)), files)


def visible_files(folder: Path) -> list[Path]:
    """All files below a folder but those with a name, or in a folder, that starts with a dot."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]


def download(path: str) -> Path:
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


def column_names(data: DataPath, file: Path | None = None) -> list[str]:
    """The columns of a file (default: the first), from its start alone; of JSON those of its first objects."""
    file = file or (*data.files, Path(data.path))[0]
    name = data.describe(file)
    require(data.kind == "hub" or file.stat().st_size, f"{name}: the file is empty.")
    if data.kind == "json":
        return list(dict.fromkeys(key for row in next(_read_objects(file, name), ("", {}))[1].values() for key in row))
    if data.kind in ("txt", *DELIMITERS):
        next(read_lines(file, name))  # raises InputError if it is no text
    if data.kind == "txt":
        return ["text"]
    try:
        names = _open_table(data, file)[0]
    except (pa.ArrowException, OSError) as error:
        raise _diagnose(data, file, error) from error
    if data.kind in DELIMITERS and len(names) == 1 and (found := re.search(r"[;\t|,]", names[0])):
        advice = "A .csv file is cut by commas, a .tsv file by tabs."
        raise InputError(f"{name}: line 1, {names[0]!r}, seems to be cut by {found[0]!r}. {advice}")
    twice = ", ".join(sorted({n for n in names if names.count(n) > 1}))
    require(not twice, f"{name}: the column {twice} is there twice. Rename one of them.")
    return names


def read_chunks(data: DataPath, texts: Sequence[str], others: Sequence[str], streaming: bool) -> Iterator[Chunk]:
    """Read the text columns and ``others`` of all files, in order; ``streaming`` does not download all of a hub's data set."""
    columns = list(dict.fromkeys((*texts, *others)))
    for file in data.files or [Path(data.path)]:
        name, available = data.describe(file), columns if data.kind == "hub" else column_names(data, file)
        for column in columns if data.kind != "json" else ():  # there a column that an object lacks is an empty cell
            check_column(name, available, column, "columns")
        if data.kind == "txt":
            yield from _read_text(file, name)
        elif data.kind == "json":
            yield from _read_json(file, name, columns, texts)
        else:
            yield from _read_table(data, file, columns, streaming)


def _open_table(data: DataPath, file: Path, columns: Sequence[str] = (), streaming: bool = True) -> tuple[list[str], Any]:
    """All column names, and an iterable of the rows of the named ones; a cell of CSV is text, also "NA" and "1.50"."""
    if data.kind == "hub":
        rows = open_hub(data.path, streaming)
        return list(rows.column_names), rows.select_columns(list(columns)).with_format("arrow").iter(ROWS)
    if data.kind == "parquet":
        parquet = pq.ParquetFile(file)
        return list(parquet.schema_arrow.names), parquet.iter_batches(ROWS, columns=list(columns))
    reader = pyarrow.csv.open_csv(
        file,
        pyarrow.csv.ReadOptions(block_size=CSV_BLOCK),
        pyarrow.csv.ParseOptions(delimiter=DELIMITERS[data.kind], newlines_in_values=True),
        pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(columns, pa.string()), include_columns=columns),
    )
    return list(reader.schema.names), reader


def _read_table(data: DataPath, file: Path, columns: Sequence[str], streaming: bool) -> Iterator[Chunk]:
    count = 0
    try:
        for rows in _open_table(data, file, columns, streaming)[1]:
            number = pa.array(np.arange(count + 1, count + 1 + len(rows)))
            yield Chunk(data.describe(file), "row", number, pa.table(rows))
            count += len(rows)
    except (pa.ArrowException, OSError) as error:
        raise _diagnose(data, file, error, count) from error


def _diagnose(data: DataPath, file: Path, error: Exception, count: int = 0) -> InputError:
    """The error for a table of which only ``count`` rows could be read: a pass over lines, then over cells, finds the place."""
    name, reason = data.describe(file), " ".join(str(error).split())
    if data.kind not in DELIMITERS:
        after, what = f"after row {count}: " if count else "", "Parquet" if data.kind == "parquet" else "readable"
        return InputError(f"{name}: {after}cut or not {what} ({reason}). Copy or write it anew.")
    for _ in read_lines(file, name):  # raises InputError for a line that is no text
        pass
    csv.field_size_limit(1 << 30)
    with contextlib.suppress(csv.Error), file.open(encoding="utf-8-sig", newline="") as text:
        width, start, rows = 0, 1, csv.reader(text, delimiter=DELIMITERS[data.kind])
        for cells in rows:
            width = width or len(cells)
            if cells and len(cells) != width:
                quote = " Maybe a quote is not closed." if rows.line_num > start else ""
                advice = 'Cells that hold the separator or a line end must be quoted ("...").'
                return InputError(f"{name}: line {start} has {len(cells)} cells, the header {width}.{quote} {advice}")
            start = rows.line_num + 1
    return InputError(f"{name}: not a readable {data.kind} file ({reason}). Maybe a quote is not closed.")


def read_lines(file: Path, name: str) -> Iterator[tuple[int, list[str]]]:
    r"""Read blocks of ``(number of the first line, lines)`` of UTF-8; lines end with ``\n``, ``\r\n`` or ``\r``."""
    number, offset = 1, 0
    with file.open("rb") as stream:
        while block := stream.read(BLOCK) + stream.readline():
            kind = "".join(kind for magic, kind in MAGIC.items() if offset == 0 and block.startswith(magic))
            require(not kind, f"{name}: line 1, byte 0: this is {kind} data, not UTF-8. Unpack it or save it as UTF-8.")
            at, fault = block.find(b"\0"), " has a NUL byte. Maybe the file is UTF-16 or binary: save it as UTF-8 text."
            try:
                text = block.decode()
            except UnicodeDecodeError as error:
                if not 0 <= at < error.start:
                    at = error.start
                    fault = f", byte {offset + at} (0x{block[at]:02x}) is not UTF-8. {ADVICE}"
            if at >= 0:
                raise InputError(f"{name}: line {number + len(LINE_END.findall(block, 0, at))}{fault}")
            lines = text.removeprefix("" if offset else "\ufeff").replace("\r\n", "\n").replace("\r", "\n").split("\n")
            lines = lines if lines[-1] else lines[:-1]
            yield number, lines
            number, offset = number + len(lines), offset + len(block)


def read_text(file: Path, name: str) -> str:
    r"""Read a whole file of UTF-8; lines end with ``\n``."""
    return "\n".join(line for _, lines in read_lines(file, name) for line in lines)


def _read_text(file: Path, name: str) -> Iterator[Chunk]:
    """The column ``text``, one row a line; blank lines are skipped and counted."""
    for first, lines in read_lines(file, name):
        rows = {number: line for number, line in enumerate(lines, first) if line.strip()}
        table = pa.table({"text": pa.array(rows.values(), pa.string())})
        yield Chunk(name, "line", pa.array(rows, pa.int64()), table, blank=len(lines) - len(rows))


def _read_json(file: Path, name: str, columns: Sequence[str], texts: Sequence[str]) -> Iterator[Chunk]:
    """A cell that an object lacks is null. Cells of one column may be of several types, which pyarrow's reader refuses."""
    for unit, rows in _read_objects(file, name):
        odd, cells = np.zeros(len(rows), dtype=np.bool_), {}
        for column in columns:
            values = [row.get(column) for row in rows.values()]
            if column in texts:
                odd |= [not isinstance(value, str | None) for value in values]
                values = [value if isinstance(value, str) else None for value in values]
            try:
                cells[column] = pa.array(values)
            except (pa.ArrowException, UnicodeEncodeError) as error:
                raise InputError(f"{name}: column '{column}' cannot be read ({error}).") from error
        yield Chunk(name, unit, pa.array(rows, pa.int64()), pa.table(cells), pa.array(odd))


def _read_objects(file: Path, name: str) -> Iterator[tuple[str, dict[int, dict[str, Any]]]]:
    """Blocks of ``(unit, {number: object})``, of a file with an object a line or with one list of objects."""
    for first, lines in read_lines(file, name):
        texts = {number: line for number, line in enumerate(lines, first) if line.strip()}
        is_list = first == 1 and next(iter(texts.values()), "").lstrip().startswith("[")
        if is_list:
            unit, rows = "row", dict(enumerate(_parse(read_text(file, name), name, 1), 1))
        else:
            unit, rows = "line", {number: _parse(line, name, number) for number, line in texts.items()}
        for number, row in rows.items():
            if not isinstance(row, dict):
                raise InputError(f"{name}: {unit} {number} is a JSON {type(row).__name__}, not an object.")
        yield unit, rows
        if is_list:
            return


def _parse(text: str, name: str, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place, advice = f"line {line + error.lineno - 1}", "Each line must be one whole object, or the file a list of objects."
        raise InputError(f"{name}: {place} is cut or not JSON ({error.msg}). {advice}") from None
