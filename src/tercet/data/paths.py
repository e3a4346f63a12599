"""Where data is: local files and folders, and data sets of the Hugging Face hub."""

import difflib
import os
import re
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from datasets import config
from huggingface_hub import hf_hub_download

from tercet.errors import InputError
from tercet.messages import warn_once
from tercet.paths import locate

PREFIX = "hf://datasets/"
SECONDS = 5.0


def download(path: str) -> Path:
    """The file's copy in the hub's cache, downloaded once.

    Raises:
        InputError: the path names no file, or the hub does not give it.
    """
    owner, name, file = (*path.removeprefix(PREFIX).split("/", 2), "", "")[:3]
    if not file:
        raise InputError(f"data.path={path}: {PREFIX}owner/name/file is needed.")
    if not config.HF_HUB_OFFLINE:
        check_reachable(path, f"{owner}/{name}")
    try:
        return Path(hf_hub_download(f"{owner}/{name}", file, repo_type="dataset"))
    except Exception as error:  # the library raises many kinds
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"data.path={path}: the hub did not give it ({said}). A local file will do in data.path.") from error


def check_reachable(path: str, name: str) -> None:
    """Ask for the data set once with a short time limit: the libraries retry for minutes."""
    request = urllib.request.Request(f"{config.HF_ENDPOINT}/api/datasets/{name}", method="HEAD")
    if token := os.environ.get("HF_TOKEN"):
        request.add_header("Authorization", f"Bearer {token}")
    try:
        urllib.request.urlopen(request, timeout=SECONDS).close()
    except urllib.error.HTTPError:
        return  # it answered: the library says what is wrong
    except OSError as error:
        raise InputError(
            f"data.path={path}: no such file or folder here, and the hub cannot be reached ({error}). Set data.path to a "
            "local file or folder, or HF_HUB_OFFLINE=1 to use a copy that was downloaded before."
        ) from error


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
class DataPath:
    """``kind`` is txt, csv, tsv, json, parquet or hub; ``files`` in reading order; ``path`` as the user wrote it."""

    path: str
    kind: str
    files: tuple[Path, ...]


def resolve(path: str) -> DataPath:
    """What ``data.path`` names.

    Raises:
        InputError: there is no such thing, or it is of no kind that can be read.
    """
    here = download(path) if path.startswith(PREFIX) else locate(path)
    if here.is_dir():
        return _folder(path, here)
    if here.exists():
        return DataPath(path, _kind(path, here), (here,))
    # With a folder of the owner's name at hand, or a known ending, a file was meant.
    folders = list(dict.fromkeys(p.parent.absolute() for p in (Path(path).expanduser(), here) if p.parent.is_dir()))
    if HUB_ID.fullmatch(path) and here.suffix.lower() not in {*KINDS, *PACKED} and not folders:
        return DataPath(path, "hub", ())
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


def _folder(path: str, folder: Path) -> DataPath:
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
    return DataPath(path, next(iter(first)), tuple(files.values()))


ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".pgm", ".ppm"}
IMAGE = ("image", "img", "picture", "photo", "face", "pixels")
LABEL = ("label", "identity", "person", "class", "target", "category", "name")
IMAGES_ACCEPTED = "a folder root/label/file, .parquet files with an image column, or a hub id (owner/name)"


def resolve_images(path: str) -> DataPath:
    """What ``data.path`` names: of kind "folder" (``files`` are its root and the images), parquet or hub.

    Raises:
        InputError: there is no such thing, or nothing in it is an image.
    """
    here = locate(path)
    if here.is_dir():
        files = sorted(f for f in here.rglob("*") if f.is_file() and not _hidden(f, here))
        images = [f for f in files if f.suffix.lower() in ENDINGS]
        if images:
            if others := len(files) - len(images):
                warn_once(f"data.path={path}: {others} of {len(files)} files are no images by their names; left out.")
            return DataPath(path, "folder", (here, *images))
        if not any(f.suffix.lower() == ".parquet" for f in files):
            raise InputError(f"data.path={path}: no image among {len(files)} files. data.path takes {IMAGES_ACCEPTED}.")
    place = resolve(path)
    if place.kind not in ("parquet", "hub"):
        raise InputError(f"data.path={path} is of kind {place.kind}. For images data.path takes {IMAGES_ACCEPTED}.")
    return place


def _hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)
