"""Paths of data and models, and checks of output folders."""

import os
from pathlib import Path

from tercet.errors import InputError, require


def locate(path: str) -> Path:
    """Resolve a path: itself if it is absolute or exists, else below the folder TERCET_DATA if that variable is set."""
    here = Path(path).expanduser()
    root = os.environ.get("TERCET_DATA")
    return here if here.is_absolute() or here.exists() or not root else Path(root) / here


def check_new_folder(folder: Path, parameter: str) -> None:
    """Raise ``InputError`` naming ``parameter`` if the folder has content, which would be overwritten."""
    in_use = folder.is_file() or (folder.is_dir() and any(folder.iterdir()))
    require(not in_use, f"`{parameter}`={folder} holds something already. Name a new folder.")


def check_writable(folder: Path, parameter: str) -> None:
    """Make the folder; raise ``InputError`` naming ``parameter`` now if it cannot be written, not after the work."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        advice = f"Set `{parameter}` to another folder."
        raise InputError(f"`{parameter}`={folder} cannot be written ({error.strerror}). {advice}") from error
