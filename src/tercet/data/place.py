"""Where the rows are: a file, a folder of one kind of file, or a data set of the hub."""

import difflib
import re
from dataclasses import dataclass
from pathlib import Path

from tercet.error import InputError
from tercet.paths import locate

KINDS = {
    ".txt": "txt",
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
}
ACCEPTED = "a .txt, .csv, .tsv, .jsonl, .json or .parquet file, a folder of one of these, or a hub id (owner/name)"
PACKED = {".gz", ".zip", ".bz2", ".xz", ".zst", ".7z", ".tar", ".tgz", ".rar"}
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+){0,2}")


@dataclass(frozen=True)
class Place:
    """``kind`` is txt, csv, tsv, json, parquet or hub; ``files`` in reading order; ``path`` as the user wrote it."""

    path: str
    kind: str
    files: tuple[Path, ...]


def find(path: str) -> Place:
    """What ``data.path`` names.

    Raises:
        InputError: there is no such thing, or it is of no kind that can be read.
    """
    here = locate(path)
    if here.is_dir():
        return _folder(path, here)
    if here.exists():
        return Place(path, _kind(path, here), (here,))
    # With a folder of the owner's name at hand, or a known ending, a file was meant.
    if HUB_ID.fullmatch(path) and here.suffix.lower() not in {*KINDS, *PACKED} and not here.parent.is_dir():
        return Place(path, "hub", ())
    raise InputError(f"data.path={path} does not exist.{_near(here)} data.path takes {ACCEPTED}.")


def _near(here: Path) -> str:
    folder = next((parent for parent in here.parents if parent.is_dir()), None)
    if folder is None:
        return ""
    names = sorted(entry.name for entry in folder.iterdir() if entry.suffix.lower() in KINDS or entry.is_dir())
    # A relative path starts in the working directory or in TERCET_DATA: say which was looked at.
    looked = f" Looked in {folder.absolute()}"
    if close := difflib.get_close_matches(here.name, names, n=3):
        return f"{looked}; near: {', '.join(close)}."
    return f"{looked}, which holds {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}." if names else f"{looked}."


def _kind(path: str, file: Path) -> str:
    suffix = file.suffix.lower()
    if suffix in KINDS:
        return KINDS[suffix]
    if suffix in PACKED:
        raise InputError(f"data.path={path} is packed ({suffix}). Unpack it first; data.path takes {ACCEPTED}.")
    got = f"a '{suffix}' file" if suffix else "a file without an ending"
    raise InputError(f"data.path={path} is {got}. data.path takes {ACCEPTED}.")


def _folder(path: str, folder: Path) -> Place:
    entries = ((entry.relative_to(folder), entry) for entry in folder.rglob("*") if entry.is_file())
    shown = {name.as_posix(): e for name, e in entries if not any(part.startswith(".") for part in name.parts)}
    files = {name: shown[name] for name in sorted(shown) if shown[name].suffix.lower() in KINDS}
    if not files:
        held = f"holds {', '.join(sorted(shown)[:8])}" if shown else "is empty"
        raise InputError(f"data.path={path}: the folder {held}. data.path takes {ACCEPTED}.")
    first: dict[str, str] = {}
    for name in files:
        first.setdefault(KINDS[files[name].suffix.lower()], name)
    if len(first) > 1:
        raise InputError(
            f"data.path={path}: the folder mixes kinds ({', '.join(f'{k}: {n}' for k, n in first.items())}). "
            "Name one file, or a folder whose files are all of one kind, in data.path."
        )
    return Place(path, next(iter(first)), tuple(files.values()))
