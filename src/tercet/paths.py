"""Paths of data and models, and checks of output folders."""

import os
from pathlib import Path

from tercet.errors import InputError


def locate(path: str) -> Path:
    """Resolve a path: itself if it is absolute or exists, else below the folder TERCET_DATA if that variable is set."""
    here = Path(path).expanduser()
    root = os.environ.get("TERCET_DATA")
    return here if here.is_absolute() or here.exists() or not root else Path(root) / here


def check_new_folder(folder: Path, parameter: str) -> None:
    """Raise ``InputError`` naming ``parameter`` if the folder has content, which would be overwritten."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise InputError(f"`{parameter}`={folder} holds something already. Name a new folder.")


def check_writable(folder: Path, parameter: str) -> None:
    """Make the folder; raise ``InputError`` naming ``parameter`` now if it cannot be written, not after the work."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = f"cannot be written ({error.strerror})"
        raise InputError(f"`{parameter}`={folder} {reason}. Set `{parameter}` to another folder.") from error
