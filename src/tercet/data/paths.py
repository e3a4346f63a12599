"""Find data: local files and folders, and data sets of the Hugging Face hub."""

import difflib
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import hf_hub_download

from tercet.errors import InputError
from tercet.paths import locate

PREFIX = "hf://datasets/"
TIMEOUT = 5.0  # seconds
KINDS = {f".{kind}": kind for kind in ("txt", "csv", "tsv", "json", "parquet")} | {".jsonl": "json", ".ndjson": "json"}
ARCHIVES = {".gz", ".zip", ".bz2", ".xz", ".zst", ".7z", ".tar", ".tgz", ".rar"}
ACCEPTED = "a .txt, .csv, .tsv, .jsonl, .json or .parquet file, a folder of one of these, or a hub id (owner/name)"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+){0,2}")


@dataclass(frozen=True)
class DataPath:
    """The ``files`` that ``path`` names, in order; ``kind`` is txt, csv, tsv, json, parquet, hub, or folder (of images)."""

    path: str
    kind: str
    files: tuple[Path, ...] = ()

    def describe(self, file: Path) -> str:
        """The start of messages about a file."""
        return f"`path`={self.path}" + ("" if len(self.files) == 1 else f", file {file.name}")


def resolve(path: str) -> DataPath:
    """Find the files that a path names: relative to the working directory, to ``TERCET_DATA``, or on the hub.

    Raises:
        InputError: nothing is there, or it is of no kind that can be read.
    """
    here = download(path) if path.startswith(PREFIX) else locate(path)
    suffix = here.suffix.lower()
    if here.is_dir():
        return _folder(path, here)
    if here.exists():
        if not os.access(here, os.R_OK):
            raise InputError(f"`path`={path} may not be read by this user: change its permissions.")
        if suffix in KINDS:
            return DataPath(path, KINDS[suffix], (here,))
        if suffix in ARCHIVES:
            raise InputError(f"`path`={path} is packed ({suffix}). Unpack it first; `path` takes {ACCEPTED}.")
        got = f"a '{suffix}' file" if suffix else "a file without an ending"
        raise InputError(f"`path`={path} is {got}. `path` takes {ACCEPTED}.")
    # A path into an existing folder, or with a known ending, names a missing file, not a data set of the hub.
    folders = list(dict.fromkeys(p.parent.absolute() for p in (Path(path).expanduser(), here) if p.parent.is_dir()))
    if HUB_ID.fullmatch(path) and suffix not in {*KINDS, *ARCHIVES} and not folders:
        return DataPath(path, "hub")
    raise InputError(f"`path`={path} does not exist.{_describe_folders(here.name, folders)} `path` takes {ACCEPTED}.")


def _describe_folders(name: str, folders: list[Path]) -> str:
    """Where a missing file was looked for, and which names there are similar."""
    entries = [e for f in folders for e in sorted(f.iterdir()) if e.suffix.lower() in KINDS or e.is_dir()]
    names = [e.name for e in entries if not e.name.startswith(".")]
    looked = f" Looked in {' and '.join(map(str, folders))}" if folders else " Its folder does not exist either"
    if close := difflib.get_close_matches(name, names, n=3):
        return f"{looked}; near: {', '.join(close)}."
    return f"{looked}, which holds {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}." if names else f"{looked}."


def _folder(path: str, folder: Path) -> DataPath:
    names = {file.relative_to(folder).as_posix(): file for file in visible_files(folder)}
    files = {name: names[name] for name in sorted(names) if names[name].suffix.lower() in KINDS}
    examples: dict[str, str] = {}
    for name, file in files.items():
        examples.setdefault(KINDS[file.suffix.lower()], name)
    if not files:
        content = f"holds {', '.join(sorted(names)[:8])}" if names else "is empty"
        raise InputError(f"`path`={path}: the folder {content}. `path` takes {ACCEPTED}.")
    if len(examples) > 1:
        raise InputError(
            f"`path`={path}: the folder mixes kinds ({', '.join(f'{k}: {n}' for k, n in examples.items())}). "
            "Name one file, or a folder whose files are all of one kind, in `path`."
        )
    return DataPath(path, next(iter(examples)), tuple(files.values()))


def visible_files(folder: Path) -> list[Path]:
    """All files below a folder but those with a name, or in a folder, that starts with a dot."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]


def download(path: str) -> Path:
    """The copy of ``hf://datasets/owner/name/file`` in the hub's cache, downloaded once."""
    owner, name, file = (*path.removeprefix(PREFIX).split("/", 2), "", "")[:3]
    if not file:
        raise InputError(f"`path`={path}: {PREFIX}owner/name/file is needed.")
    message = f"`path`={path}: the hub did not give it ({{}}). A local file will do in `path`."
    return Path(_load(path, f"{owner}/{name}", message, lambda name: hf_hub_download(name, file, repo_type="dataset")))


def open_hub(path: str, streaming: bool) -> Any:
    """Load the data set ``owner/name[:config[:split]]``; the split is ``train`` by default.

    Raises:
        InputError: the hub cannot be reached or has no such data set, config or split.
    """
    name, config, split = (*path.split(":"), None, None)[:3]
    message = (
        f"`path`={path}: no such file or folder here, and the hub gave none: {{}} "
        f"`path` takes {ACCEPTED}; a hub id may go on with :config and :split."
    )
    return _load(
        path, str(name), message, lambda name: datasets.load_dataset(name, config, split=split or "train", streaming=streaming)
    )


def _load(path: str, name: str, message: str, load: Callable[[str], Any]) -> Any:
    """Load a data set; first ask for it once with a short time limit, since the libraries retry for minutes."""
    if not datasets.config.HF_HUB_OFFLINE:
        request = urllib.request.Request(f"{datasets.config.HF_ENDPOINT}/api/datasets/{name}", method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=TIMEOUT).close()
        except urllib.error.HTTPError:
            pass  # the hub answers: the library says what is wrong
        except OSError as error:
            raise InputError(
                f"`path`={path}: no such file or folder here, and the hub cannot be reached ({error}). Set `path` to a "
                "local file or folder, or HF_HUB_OFFLINE=1 to use a copy that was downloaded before."
            ) from error
    try:
        return load(name)
    except Exception as error:  # the libraries raise dozens of kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(message.replace("{}", reason)) from error
