"""Paths of data and models, checks of output folders, and writing whole files."""

import errno
import fcntl
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from tercet.errors import InputError, require
from tercet.messages import warn_once

RENAME_MANY = "(for many: convmv -r -f latin1 -t utf8 --notest)"  # names that are not UTF-8
PARTIAL = ".partial-"  # how the names of unfinished files begin
SMALL = 1 << 24  # bytes of a settings file, at most
_real_folder = lru_cache(maxsize=4096)(os.path.realpath)  # images lie in few folders


def locate(path: str) -> Path:
    """Resolve a path: itself if it is absolute or exists, else below the folder TERCET_DATA if that variable is set."""
    here = Path(os.path.expanduser(path))
    root = os.environ.get("TERCET_DATA")
    return here if here.is_absolute() or here.exists() or not root else Path(root) / here


def cache_folder(cache: str | None = None) -> Path:
    """The folder itself, else ``TERCET_CACHE``, else ``~/.cache/tercet``."""
    return Path(cache or os.environ.get("TERCET_CACHE") or Path.home() / ".cache" / "tercet").expanduser()


def locate_inside(name: str, roots: Sequence[str]) -> str | None:
    """The path of a file, a relative ``name`` from the first of ``roots`` on; None if, links followed, no root holds it.

    ``roots`` are folders without links.
    """
    folder, _, last = os.path.join(roots[0], name).rpartition("/")
    if "\0" in name:
        return None
    real = f"{_real_folder(folder or '/')}/{last}"
    if last in ("", ".", "..") or os.path.islink(real):
        real = os.path.realpath(real)
    return f"{folder}/{last}" if any(real.startswith(f"{root.rstrip('/')}/") for root in roots) else None


def visible_files(folder: Path) -> list[Path]:
    """All files below a folder, sorted, but those with a name, or in a folder, that starts with a dot.

    Folders that are links are followed inside of ``folder``, but nothing is read twice. Raises ``InputError`` about ``path``
    for links that lead out of it, folders that cannot be read, and names that are not UTF-8.
    """

    def refuse(error: OSError) -> None:
        raise InputError(f"`path`={folder}: {error.filename} cannot be read ({error.strerror}). Change its permissions.")

    root, seen, links, found = folder.resolve(), set[Path](), [folder], list[Path]()
    for link in links:  # grows while it is read
        inside, target = link.relative_to(folder).as_posix(), link.resolve()
        outside = f"`path`={folder}: the folder {inside} is a link to {target}, which is outside. Move or copy that here."
        require(target.is_relative_to(root), outside)
        if target in seen:
            warn_once(f"{folder}: {inside} is a link to {target.relative_to(root)}, which is read already; left out.")
            continue
        for here, folders, names in os.walk(link, onerror=refuse):
            seen.add(Path(here).resolve())
            inner = [Path(here, name) for name in folders if not name.startswith(".")]
            links += [path for path in inner if path.is_symlink()]
            folders[:] = [path.name for path in inner if path.resolve() not in seen]  # os.walk follows no links itself
            files = [Path(here, name) for name in names if not name.startswith(".")]
            found += [path for path in files if path.is_file()]
            for path in files:
                if not path.exists():
                    warn_once(f"{folder}: {path.relative_to(folder)} is a link to nothing; left out.")
    for file in (path.relative_to(folder) for path in found):
        for part in (*reversed(file.parents), file):
            what = "file" if part is file else "folder"
            fault = f"the name of the {what} {os.fsencode(part)!r} is not UTF-8"
            require(is_utf8(part.name), f"`path`={folder}: {fault}. Rename it {RENAME_MANY}.")
    return sorted(found)


def is_utf8(name: str) -> bool:
    """Whether the name of a file, or a text of the command line, can be written to a file: its bytes are UTF-8."""
    return name.isascii() or name.encode(errors="replace") == name.encode(errors="surrogatepass")


def remove_empty(folder: Path, root: Path) -> None:
    """Remove the folder if it is empty, and empty ones around it that are below ``root``."""
    folder = folder.absolute()
    for path in (folder, *(parent for parent in folder.parents if root in parent.parents)):
        with suppress(OSError):  # it holds something
            path.rmdir()


def check_new_folder(folder: Path, parameter: str) -> None:
    """Raise ``InputError`` naming ``parameter`` if the folder has content, which would be overwritten."""
    in_use = folder.is_file() or (folder.is_dir() and any(folder.iterdir()))
    require(not in_use, f"`{parameter}`={folder} holds something already. Name a new folder.")


def check_writable(folder: Path, parameter: str) -> None:
    """Make the folder; raise ``InputError`` naming ``parameter`` now if it cannot be written, not after the work."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / _partial_name()
        probe.touch()
        probe.unlink(missing_ok=True)  # another process may have removed it, as one that was left behind
    except OSError as error:
        advice = f"Set `{parameter}` to another folder."
        raise InputError(f"`{parameter}`={folder} cannot be written ({error.strerror}). {advice}") from error


def read_regular_file(path: Path, limit: int) -> bytes:
    """The content of a file; ``InputError`` for more than ``limit`` bytes, and for devices and pipes, which may never end."""
    info = path.stat()
    require(stat.S_ISREG(info.st_mode), f"{path} is not a regular file.")
    require(info.st_size <= limit, f"{path} has {info.st_size:,} bytes; {limit:,} are accepted.")
    return path.read_bytes()


def read_json_file(path: Path) -> Any:
    """The content of a JSON file of settings; ``InputError`` where it is no JSON, or larger than ``SMALL``."""
    content = read_regular_file(path, SMALL)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, a number of thousands of digits, endless brackets
        raise InputError(f"{path} is cut or not JSON ({error}). Copy or write it anew.") from error


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield an empty file beside ``path``, with its suffix, to be written; at the end it is synced and renamed to ``path``.

    So a reader, also after a kill or a power failure, finds the old file or the new one, whole. At an error the old one stays
    and the new one is removed; an ``OSError`` names ``path``. Permissions are those of any new file, as the umask says.
    """
    path, partial = Path(path), None
    try:
        with _locked_partial(path.parent, Path.touch, path.suffix) as partial:
            yield partial
            _sync(partial)
            partial.replace(path)
    except BaseException as error:
        with suppress(OSError):
            if partial is not None:
                partial.unlink()
        if isinstance(error, OSError) and (partial is None or error.filename in (None, str(partial))):
            error.filename = str(path)
        raise
    with suppress(OSError):  # not every file system can sync a folder
        _sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to be filled; at the end its files are synced and moved to ``path``, at an error removed.

    A ``path`` that is there keeps its other files.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(path if path.is_dir() else path.parent) as made:
        yield made
        files = [file for file in made.rglob("*") if file.is_file()]
        for file in files:
            _sync(file)
        if not path.exists():
            made.rename(path)
            return
        for file in files:
            target = path / file.relative_to(made)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.replace(target)


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """Yield a new folder in ``parent``; it is removed at the end, with what is left in it."""
    with _locked_partial(parent, Path.mkdir) as folder:
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def remove_partials(folder: Path) -> None:
    """Remove the unfinished files and folders that killed processes have left; what is being written is locked."""
    for path in folder.glob(f"{PARTIAL}*"):
        with suppress(OSError), _locked(path):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def _locked_partial(parent: Path, make: Callable[[Path], None], suffix: str = "") -> Iterator[Path]:
    """Make an unfinished file or folder, locked as long as this process lives.

    Another process that removes what was left behind may take it before it is locked: then another is made.
    """
    with ExitStack() as locks:
        path = parent / _partial_name(suffix)
        make(path)
        try:
            locks.enter_context(_locked(path))
            taken = not path.exists()
        except OSError as error:
            taken = error.errno in (errno.ENOENT, errno.EWOULDBLOCK)  # else this file system has no locks
        if taken:
            path = locks.enter_context(_locked_partial(parent, make, suffix))
        yield path


def _partial_name(suffix: str = "") -> str:
    return f"{PARTIAL}{secrets.token_hex(8)}{suffix}"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Lock an unfinished file; ``OSError`` where it cannot be."""
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
