"""Find data: files, folders of files, and data sets of the hub; read them in chunks of rows."""

import difflib
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
from huggingface_hub import hf_hub_download

from tercet.data.columns import Chunk, check_column, files_fingerprint, plain_schema, text_fingerprint
from tercet.data.file_formats import FORMATS, JSON, ROWS, Format, Opened, number_rows
from tercet.errors import InputError, refuse_damaged, require
from tercet.paths import locate, visible_files

PREFIX = "hf://datasets/"
TIMEOUT = 5.0  # seconds
ARCHIVES = {".gz", ".zip", ".bz2", ".xz", ".zst", ".7z", ".tar", ".tgz", ".rar"}
ACCEPTED = "a .txt, .csv, .tsv, .jsonl, .json or .parquet file, a folder of one of these, or a hub id (owner/name)"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+){0,2}")


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
            with refuse_damaged(name):
                yield from chunks

    def _open(self, columns: Sequence[str], texts: Sequence[str]) -> Iterator[tuple[str, pa.Schema, Iterator[Chunk]]]:
        for file in self.files or (Path(self.path),):
            name = self.describe(file)
            require(not file.is_file() or file.stat().st_size, f"{name}: the file is empty.")
            with refuse_damaged(name):
                schema, chunks = self.format.open(file, name, columns, texts)
            twice = ", ".join(sorted({n for n in schema.names if schema.names.count(n) > 1}))
            require(not twice, f"{name}: the column {twice} is there twice. Rename one of them.")
            yield name, schema, chunks

    def describe(self, file: Path) -> str:
        """The start of messages about a file."""
        return f"`path`={self.path}" + ("" if len(self.files) < 2 else f", file {file.name}")

    def fingerprint(self, options: Sequence[Any], whole: bool = True) -> str:
        """Hash the options and the files' contents, with ``whole`` false at most a GiB, but not where they are."""
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
        folders = list(dict.fromkeys(p.parent.absolute() for p in (Path(os.path.expanduser(path)), here) if p.parent.is_dir()))
        if HUB_ID.fullmatch(path) and suffix not in {*FORMATS, *ARCHIVES} and not folders:
            return DataPath(path, Format("hub", partial(_open_hub, streaming)))
        is_named = path == here.name and suffix == ".parquet" and not os.environ.get("TERCET_DATA")
        unset = " The environment variable TERCET_DATA, which names the folder of the experiments' data, is not set." * is_named
        described = _describe_folders(here.name, folders)
        raise InputError(f"`path`={path} does not exist.{described}{unset} `path` takes {ACCEPTED}.")
    require(here.is_file(), f"`path`={path} is a device or a pipe. `path` takes {ACCEPTED}.")
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


def _download(path: str) -> Path:
    """The copy of ``hf://datasets/owner/name/file`` in the hub's cache, downloaded once."""
    owner, name, file = (*path.removeprefix(PREFIX).split("/", 2), "", "")[:3]
    require(file, f"`path`={path}: {PREFIX}owner/name/file is needed.")
    return Path(_load(path, f"{owner}/{name}", lambda: hf_hub_download(f"{owner}/{name}", file, repo_type="dataset")))


def open_hub(path: str, streaming: bool) -> Any:
    """Load the data set ``owner/name[:config[:split]]``; the split is ``train`` by default."""
    name, config, split = (*path.split(":"), "", "")[:3]
    return _load(path, name, lambda: datasets.load_dataset(name, config or None, split=split or "train", streaming=streaming))


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
    # A stream of CSV or JSON files does not know its columns before it has read a row.
    features = rows.features or datasets.Dataset.from_list(list(rows.take(1))).features
    batches = rows.select_columns(list(columns)).with_format("arrow").iter(ROWS)
    return plain_schema(features.arrow_schema), number_rows(name, "readable", batches)
