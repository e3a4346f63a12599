"""Where relative paths of data and models start, and whether a folder can be written."""

import os
from pathlib import Path

from tercet.errors import InputError


def locate(path: str) -> Path:
    """The path itself if it exists, else the same path under ``TERCET_DATA`` (whether it exists there or not)."""
    here = Path(path).expanduser()
    root = os.environ.get("TERCET_DATA")
    return here if here.is_absolute() or here.exists() or not root else Path(root) / here


def check_new_folder(folder: Path, key: str) -> None:
    """Raise ``InputError`` naming ``key`` where something would be written over."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise InputError(f"{key}={folder} holds something already. Name a new folder.")


def check_writable(folder: Path, key: str) -> None:
    """Make the folder; raise ``InputError`` naming ``key`` now, rather than fail when the work is done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"{key}={folder} cannot be written ({error.strerror}). Set {key} to another folder.") from error
