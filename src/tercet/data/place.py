"""Where the rows are: a file, a folder of one kind of file, or a data set of the hub."""

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from tercet.data.hub_file import PREFIX, fetch
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
    here = fetch(path) if path.startswith(PREFIX) else locate(path)
    if here.is_dir():
        return _folder(path, here)
    if here.exists():
        return Place(path, _kind(path, here), (here,))
    # With a folder of the owner's name at hand, or a known ending, a file was meant.
    folders = list(dict.fromkeys(p.parent.absolute() for p in (Path(path).expanduser(), here) if p.parent.is_dir()))
    if HUB_ID.fullmatch(path) and here.suffix.lower() not in {*KINDS, *PACKED} and not folders:
        return Place(path, "hub", ())
    raise InputError(f"data.path={path} does not exist.{_near(here.name, folders)} data.path takes {ACCEPTED}.")


def _near(name: str, folders: list[Path]) -> str:
    """What the folders hold: a relative path starts in the working directory and in TERCET_DATA."""
    entries = [e for f in folders for e in sorted(f.iterdir()) if e.suffix.lower() in KINDS or e.is_dir()]
    names = [e.name for e in entries if not e.name.startswith(".")]
    looked = f" Looked in {' and '.join(map(str, folders))}" if folders else " Its folder does not exist either"
    if close := difflib.get_close_matches(name, names, n=3):
        return f"{looked}; near: {', '.join(close)}."
    return f"{looked}, which holds {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}." if names else f"{looked}."


def _kind(path: str, file: Path) -> str:
    suffix = file.suffix.lower()
    if not os.access(file, os.R_OK):
        raise InputError(f"data.path={path} may not be read by this user: change its permissions.")
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
