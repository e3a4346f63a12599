"""All runs below a folder, with their states and metrics; what has been read is cached. Imports here are light."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import SoftFileLease, Timeout

from tercet.app import run_files
from tercet.app.components import walk
from tercet.app.run_files import CURVES_FILE, ERROR, LOCK, RESULTS, SETTINGS
from tercet.errors import InputError, require
from tercet.paths import cache_folder, read_regular_file, remove_empty, write_text

STATES = ("running", "finished", "stopped", "failed", "dead")
VERSION = 1  # of the cache
SWEEP = "multirun.yaml"  # Hydra writes it into the folder of a sweep
# The settings that a list shows: to read all of them, which are YAML, takes fifty times as long.
SHOWN = re.compile(r"^(?:command|expected|name|optimized_metric|seed):.*\n(?:(?:[ -].*)?\n)*", re.MULTILINE)
NOT_COMPARED = ("run", "command", "output_dir")  # which differ between any two runs


@dataclass(frozen=True)
class Run:
    """A run, as its folder shows it.

    ``state``: ``running`` (a process renews the folder's lock), ``dead`` (that process is gone and could not say why),
    ``finished``, ``failed`` (``error`` is the message) or ``stopped`` (by a signal; ``resume=true`` continues it).
    ``started`` and ``updated`` are seconds since 1970. ``sweep`` is the folder of the sweep that the run is a job of.
    """

    folder: Path
    state: str
    name: str = ""
    seed: int | None = None
    command: tuple[str, ...] = ()
    sweep: Path | None = None
    started: float = 0.0
    updated: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    main_metric: str | None = None
    error: str = ""


def list_runs(folder: str | Path = "outputs") -> list[Run]:
    """All runs in or below a folder, the newest first.

    A file is read again only where its time or size has changed: the second look at 5,000 runs takes less than a second.
    """
    root = Path(folder)
    require(root.is_dir(), f"`folder`={folder}: there is no such folder. Runs are in outputs/, where training was started.")
    cache = cache_folder() / "runs" / f"{hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:32]}.json"
    known, seen = _read_cache(cache), dict[str, Any]()
    runs = []
    for path in run_files.find_runs([root], (SETTINGS, LOCK, ERROR)):
        key, stamps = str(path.relative_to(root)), _stamps(path)
        entry = known.get(key)
        seen[key] = entry if entry and entry["stamps"] == stamps else {"stamps": stamps, **_read(path)}
        runs.append(_run(path, seen[key]))
    if seen != known:
        with suppress(OSError, UnicodeEncodeError):  # a cache only
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_text(cache, json.dumps({"version": VERSION, "runs": seen}, separators=(",", ":")))
    return sorted(runs, key=lambda run: run.started, reverse=True)


def _read_cache(cache: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError, LookupError, TypeError):  # damaged: all is read again
        found = json.loads(cache.read_bytes())
        if isinstance(found, dict) and found.get("version") == VERSION:
            return dict(found["runs"])
    return {}


def _stamps(path: Path) -> dict[str, list[int]]:
    """The time in nanoseconds and the size of each file of a run that a list depends on."""
    found = {}
    for name in (SETTINGS, RESULTS, ERROR):
        with suppress(FileNotFoundError):
            info = os.stat(f"{path}/{name}")
            found[name] = [info.st_mtime_ns, info.st_size]
    return found


def _read(path: Path) -> dict[str, Any]:
    """What the files of a run say, as JSON can hold it; a damaged one is its ``error``."""
    entry: dict[str, Any] = {"finished": False, "settings": {}, "metrics": {}, "main": None, "error": ""}
    try:
        text = ""
        if (path / SETTINGS).is_file():
            text = read_regular_file(path / SETTINGS, run_files.SETTINGS_SIZE).decode(errors="replace")
            entry["settings"] = _shown_settings(text, str(path / SETTINGS))
        if (path / RESULTS).is_file():
            results = run_files.read_results(path)
            entry["finished"] = bool(text) and run_files.is_of_same_run(text, results)
            entry["metrics"] = {name: float(value) for name, value in results.items() if name != "run"}
            entry["main"] = run_files.main_metric(entry["settings"], entry["metrics"])
        if (path / ERROR).is_file():
            error = read_regular_file(path / ERROR, run_files.ERROR_SIZE)
            entry["error"] = error.decode(errors="replace").strip()
    except (InputError, OSError) as error:
        entry["error"] = str(error)
    return entry


def _shown_settings(text: str, what: str) -> dict[str, Any]:
    found = run_files.parse_settings("".join(SHOWN.findall(text)) or text, what)
    command, expected = found.get("command"), found.get("expected")
    is_command = isinstance(command, list) and all(isinstance(part, str) for part in command)
    return {
        "name": str(found.get("name") or ""), "seed": found.get("seed") if type(found.get("seed")) is int else None,
        "command": command if is_command else [], "optimized_metric": str(found.get("optimized_metric")),
        "expected": [str(name) for name in expected] if isinstance(expected, dict) else [],
    }  # fmt: skip


def _run(path: Path, entry: dict[str, Any]) -> Run:
    alive = run_files.is_alive(path)
    ended = "finished" if entry["finished"] else "failed" if entry["error"] else "stopped"
    state = ended if alive is None else "running" if alive else "dead"
    settings, times = entry["settings"], {name: stamp[0] / 1e9 for name, stamp in entry["stamps"].items()}
    for name in (LOCK, CURVES_FILE):
        with suppress(FileNotFoundError):
            times[name] = os.stat(f"{path}/{name}").st_mtime
    job = path.name.isdecimal() or os.path.exists(f"{path.parent}/{SWEEP}")  # Hydra numbers jobs, if they are not named
    return Run(
        path, state, settings.get("name", ""), settings.get("seed"), tuple(settings.get("command", ())),
        path.parent if job else None, times.get(SETTINGS, min(times.values(), default=0.0)), max(times.values(), default=0.0),
        entry["metrics"] if ended == "finished" else {}, entry["main"] if ended == "finished" else None, entry["error"],
    )  # fmt: skip


def find_run(name: str, folder: str | Path = "outputs") -> Run:
    """One run: by its path, by its id, the last part of its path, or by the unique beginning of that."""
    if any((Path(name) / file).exists() for file in (SETTINGS, LOCK, ERROR)):
        return _run(Path(name), {"stamps": _stamps(Path(name)), **_read(Path(name))})
    runs = list_runs(folder)
    found = [run for run in runs if f"/{run.folder.as_posix()}".endswith(f"/{name}")]
    found = found or [run for run in runs if run.folder.name.startswith(name)]
    require(found, f"{name}: no run of this path or id is there. `tercet runs list` shows those in {folder}.")
    listed = ", ".join(str(run.folder) for run in found[:4]) + (", …" if len(found) > 4 else "")
    require(len(found) == 1, f"{name} may be any of {len(found)} runs ({listed}). Give more of its path.")
    return found[0]


def best_runs(runs: Sequence[Run], metric: str) -> list[Run]:
    """The finished runs that have the metric, from the best to the worst; the evaluators declare which way is better."""
    found = [run for run in runs if metric in run.metrics]
    known = ", ".join(sorted({name for run in runs for name in run.metrics if not name.startswith("train/")}))
    require(found, f"`metric`={metric} is in none of the finished runs. There are: {known or 'no finished runs'}.")
    names = run_files.smaller_is_better(run_files.read_settings(found[0].folder))
    measured = [run for run in found if run.metrics[metric] == run.metrics[metric]]  # NaN has no rank
    return sorted(measured, key=lambda run: run.metrics[metric], reverse=not run_files.is_smaller_better(metric, names))


def differences(first: Run, second: Run) -> list[tuple[str, Any, Any]]:
    """The settings and metrics, by name, that differ between two runs, with the value of each; None where one lacks it."""
    sides = []
    for run in (first, second):
        settings = run_files.read_settings(run.folder) if (run.folder / SETTINGS).is_file() else {}
        plain = {key: value for key, value in walk(settings) if not isinstance(value, dict)}
        sides.append({key: value for key, value in plain.items() if key not in NOT_COMPARED} | run.metrics)
    one, other = sides
    return [(key, one.get(key), other.get(key)) for key in {**one, **other} if one.get(key) != other.get(key)]


def folder_size(folder: Path) -> int:
    """The bytes of all files in a folder; links are not followed."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())


def remove_run(run: Run, root: Path) -> int:
    """Delete the folder of a run that has ended, below the folder ``root``; returns the bytes that were freed.

    Raises ``InputError`` for a run whose process may still write, and for a folder that is not of a run or not below ``root``.
    """
    folder, inside = run.folder.resolve(), root.resolve()
    require(inside in folder.parents and not run.folder.is_symlink(), f"{run.folder} is not below {root}; it is kept.")
    require(_is_own(folder), f"{run.folder} has no settings of a run of Tercet; it is kept.")
    in_use = f"{run.folder} is in use by a process that runs; it is kept."
    require(run_files.process_is_gone(folder) is not False, in_use)
    lease = SoftFileLease(folder / LOCK, lease_duration=run_files.LEASE_SECONDS, thread_local=False)
    try:  # the lock of another machine is watched for as long as it would be valid
        lease.acquire(timeout=run_files.LEASE_SECONDS + 10)
    except Timeout:
        raise InputError(in_use) from None
    try:
        size = folder_size(folder) - (folder / LOCK).stat().st_size
        # The settings are the last: they say what is left, if this is cut off.
        for path in sorted(folder.iterdir(), key=lambda path: path.name == SETTINGS):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()
    finally:
        lease.release()
    remove_empty(folder, inside)
    return size


def _is_own(folder: Path) -> bool:
    """Whether a folder has the settings of a run, or nothing but what a run leaves that has failed before it wrote them."""
    if (folder / SETTINGS).is_file():
        with suppress(InputError):
            return {"command", "output_dir", "seed"} <= run_files.read_settings(folder).keys()
        return False
    return {path.name for path in folder.iterdir()} <= {ERROR, LOCK}
