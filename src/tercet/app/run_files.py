"""Reading the files of a run folder, which may be a stranger's or still written to. Imports here are light."""

import csv
import os
import re
import tempfile
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from filelock import SoftFileLease
from omegaconf import ListConfig

from tercet.app.hydra_compat import PlainLoader
from tercet.errors import InputError, require
from tercet.paths import read_json_file, read_regular_file

SETTINGS, RESULTS, CURVES_FILE, ERROR = "config.yaml", "metrics.json", "metrics.csv", "error.txt"
LOCK = ".lock"
LEASE_SECONDS = 30.0  # a run whose lock has not been renewed for so long is taken for dead
SETTINGS_SIZE = 1 << 19  # bytes of a config.yaml, at most
ERROR_SIZE = 1 << 16  # and of an error.txt

Metrics = dict[str, float]


def parse_settings(content: bytes | str, what: str) -> dict[str, Any]:
    """Settings of a run as plain values: no interpolation in them is resolved; ``InputError`` names ``what`` holds them."""
    try:
        found = yaml.load(content, PlainLoader)
    except (yaml.YAMLError, ValueError, TypeError) as error:  # of constructors: no number, no key
        raise InputError(f"{what} cannot be read as the settings of a run ({' '.join(str(error).split())}).") from error
    require(isinstance(found, dict), f"{what} is not the settings of a run: keys with values are needed.")
    return dict(found)


def read_settings(run: Path) -> dict[str, Any]:
    """The ``config.yaml`` of a run, which may be a stranger's, as plain values: no interpolation in it is resolved."""
    return parse_settings(read_regular_file(run / SETTINGS, SETTINGS_SIZE), str(run / SETTINGS))


def read_results(run: Path, name: str = RESULTS) -> dict[str, Any]:
    """The ``metrics.json`` of a run, or another file of metrics: its metrics, and the identity ``run``."""
    file = run / name
    found = read_json_file(file)
    needed = f"{file} is not the metrics of a run: names with a number each are needed."
    require(isinstance(found, dict), needed)
    for name, value in found.items():
        require(type(value) is float or (type(value) is int and abs(value) < 1e300) or name == "run", needed)
    return dict(found)


def read_metrics(run: Path, name: str = RESULTS) -> Metrics:
    """The metrics that a run has written."""
    return {name: float(value) for name, value in read_results(run, name).items() if name != "run"}


def read_curves(run: Path) -> dict[str, list[tuple[float, float]]]:
    """The (step, value) pairs of each column of ``metrics.csv``, which grows while a run trains; empty without that file."""
    curves: dict[str, list[tuple[float, float]]] = {}
    file = run / CURVES_FILE
    if not file.is_file():
        return curves
    with file.open(newline="", encoding="utf-8", errors="replace") as lines:
        for row in csv.DictReader(lines):
            for name, value in row.items():
                if value and row.get("step") and name != "step":
                    curves.setdefault(name, []).append((float(row["step"]), float(value)))
    return curves


def is_run(folder: Path) -> bool:
    """Whether this is the folder of a run, which has its settings."""
    return (folder / SETTINGS).is_file()


def is_finished(run: Path) -> bool:
    """Whether the folder has metrics, and they are of the run in its ``config.yaml``, not of one before it."""
    if not all((run / name).is_file() for name in (SETTINGS, RESULTS)):
        return False
    return is_of_same_run(read_regular_file(run / SETTINGS, SETTINGS_SIZE).decode(errors="replace"), read_results(run))


def is_of_same_run(settings: str, results: Mapping[str, Any]) -> bool:
    """Whether the results carry the identity that the text of ``config.yaml`` ends with."""
    found = re.findall(r"^run: (\w+)$", settings, re.MULTILINE)
    return [results.get("run")] == (found or [None])  # None: of an earlier version


def is_alive(run: Path) -> bool | None:
    """Whether a process writes there: it renews the lock of the folder. None where there is no lock: the run has ended.

    A process of this machine that is gone is dead at once, any other after ``LEASE_SECONDS`` without a sign of life.
    """
    try:
        age = time.time() - (run / LOCK).stat().st_mtime
    except FileNotFoundError:
        return None
    return age <= LEASE_SECONDS and not process_is_gone(run)


def process_is_gone(run: Path) -> bool | None:
    """Whether the process that holds the folder does not exist any more; None where it is not known, as of another machine."""
    owner, own = SoftFileLease(run / LOCK, lease_duration=LEASE_SECONDS).owner, _own_record()
    if owner is None or own is None or owner.hostname != own.hostname:
        return None
    if owner.start and own.start and owner.start >> 64 != own.start >> 64:  # the id of the boot
        return True
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's
        return False
    return False


@cache
def _own_record() -> Any:
    """This process as a lock names it: its machine, container and boot."""
    with tempfile.TemporaryDirectory() as folder, SoftFileLease(Path(folder) / LOCK, lease_duration=LEASE_SECONDS) as lease:
        return lease.owner


def find_runs(paths: Sequence[Path], files: Sequence[str] = (SETTINGS,)) -> list[Path]:
    """The folders of runs in or below ``paths``, which hold one of ``files``, in the order of their names and numbers.

    What is inside of a run, as its stages, is no run. Links are not followed.
    """
    found = {folder for path in paths for folder in _walk(path, frozenset(files))}
    return sorted(found, key=lambda folder: [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in folder.parts])


def _walk(folder: Path, files: frozenset[str]) -> Iterator[Path]:
    pending = [str(folder)]
    while pending:
        here = pending.pop()
        try:
            with os.scandir(here) as entries:
                inside = list(entries)
        except OSError:  # it is gone, or may not be read
            continue
        if any(entry.name in files for entry in inside):
            yield Path(here)
        else:
            pending += [entry.path for entry in inside if entry.is_dir(follow_symlinks=False)]


def smaller_is_better(settings: Mapping[str, Any]) -> frozenset[str]:
    """The names, without stage, suite and task, of a run's metrics that are better when smaller."""
    names = settings.get("smaller_is_better")
    if isinstance(names, list | ListConfig):
        return frozenset(map(str, names))
    from tercet.evaluation.direction import SMALLER_IS_BETTER  # of a run that has not recorded them; imports torch

    return SMALLER_IS_BETTER


def metric_kind(metric: str) -> str:
    """The last part of a metric's name, without its stage, suite and task: what evaluators declare a direction for."""
    return metric.rsplit("/", 1)[-1]


def is_smaller_better(metric: str, names: Container[str]) -> bool:
    """Whether less of a metric is better: whether its kind is one of ``names``, those of ``smaller_is_better``.

    >>> is_smaller_better("val/sts/stsb/uniformity", {"uniformity"}), is_smaller_better("val/sts/stsb/spearman", {"uniformity"})
    (True, False)
    """
    return metric_kind(metric) in names


def main_metric(settings: Mapping[str, Any], metrics: Mapping[str, float]) -> str | None:
    """The metric to show first: the first that was measured of ``expected``, ``optimized_metric``, those of the test suite.

    An ``optimized_metric`` of validation stands for the same one of the test suite.
    """
    optimized = str(settings.get("optimized_metric")).replace("val/", "test/", 1)
    tests = (name for name in metrics if name.startswith("test/"))
    return next((name for name in (*(settings.get("expected") or ()), optimized, *tests) if name in metrics), None)
