"""The folder of a run: it belongs to one run, and one run at a time writes there."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import LeaseCompromise, SoftFileLease, Timeout

from tercet.app.error_formatting import explain
from tercet.app.record import is_main_process
from tercet.app.run_files import ERROR, LEASE_SECONDS, LOCK, SETTINGS, find_runs
from tercet.errors import InputError
from tercet.messages import print_status, warn_once
from tercet.paths import PARTIAL, remove_partials

WAIT_SECONDS = LEASE_SECONDS + 10  # for a run that is ending, or is dead
MOVING = ".before"  # the folder of a run that is being set aside
ASIDE = re.compile(r"before-(\d+)")
RUN = ("config.yaml", "metrics.json", "checkpoints/*.ckpt", "[0-9]*_*/config.yaml")  # what only a run or its stages have


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Hold a run's folder; a run that is ending there is waited for, a dead one's lock is taken over.

    A thread renews the lock. Raises ``InputError`` naming the process that holds it after ``WAIT_SECONDS``. Of several
    processes of a run the first one holds it.
    """
    if not is_main_process():
        with _failures_recorded(output):
            yield
        return
    lease = SoftFileLease(output / LOCK, lease_duration=LEASE_SECONDS, thread_local=False, on_compromise=_lost)
    try:
        lease.acquire(timeout=1)  # a dead process's lock is free at the second try
    except Timeout:
        _wait(lease, output)
    try:
        remove_partials(output)
        remove_partials(output / "checkpoints")
        if (output / MOVING).is_dir():  # a process was killed in it
            set_aside(output)
        (output / ERROR).unlink(missing_ok=True)  # of an earlier start
        with _failures_recorded(output):
            yield
    finally:
        lease.release()


@contextmanager
def _failures_recorded(output: Path) -> Iterator[None]:
    """Leave ``error.txt`` in the folder of a run that fails; one that a signal stops leaves none."""
    try:
        yield
    except Exception as error:
        if holds_run(output):
            write_failure(output, error)
        raise


def write_failure(output: Path, error: Exception) -> None:
    """Write the message of an error into a run's folder. Of several processes the first to fail knows why: its own stays."""
    is_one_of_many = "RANK" in os.environ or int(os.environ.get("SLURM_NTASKS", 1)) > 1
    with suppress(OSError), (output / ERROR).open("x" if is_one_of_many else "w", encoding="utf-8") as file:
        file.write(explain(error, "train") + "\n")


def _wait(lease: SoftFileLease, output: Path) -> None:
    owner = lease.owner
    by = f"process {owner.pid} on {owner.hostname.partition('?')[0]}" if owner else "another process"
    print_status(f"{output} is in use by {by}; waiting up to {WAIT_SECONDS:.0f} seconds for it to end.")
    try:
        lease.acquire(timeout=WAIT_SECONDS, poll_interval=0.2)
    except Timeout:
        advice = "Wait until it has ended, end it, or use another output_dir."
        raise InputError(f"output_dir={output} is in use by {by}, which writes its run there. {advice}") from None


def _lost(loss: LeaseCompromise) -> None:
    if loss.reason == "owner-changed":  # this process was suspended for so long that another one goes on in its place
        print(f"{loss.lock_file} has been taken over by another process; this one ends and writes no more.", file=sys.stderr)
        os._exit(1)
    warn_once(f"{loss.lock_file} could not be renewed ({loss.reason}): another run might begin in this folder.")


def holds_run(output: Path) -> bool:
    """Whether a run, or one with stages, has begun to write there."""
    return any(next(output.glob(pattern), None) for pattern in RUN)


def runs_inside(folder: Path) -> list[Path]:
    """The runs below a folder that is none itself, the newest first, without those that were set aside."""
    if holds_run(folder):
        return []
    found = [(run, run.relative_to(folder).parts[0]) for run in find_runs([folder])]
    runs = [run for run, first in found if not ASIDE.fullmatch(first) and not first.startswith(".")]
    return sorted(runs, key=lambda run: (run / SETTINGS).stat().st_mtime_ns, reverse=True)


def check_no_runs_inside(key: str, folder: Path, why: str = "") -> None:
    """Raise ``InputError`` about the ``key`` for a folder that is no run and holds some: one of them is meant."""
    if runs := runs_inside(folder):
        many = f"{len(runs)} runs, the newest" if len(runs) > 1 else "the run"
        raise InputError(f"{why}{key}={folder} is no run or model itself; it holds {many} {runs[0]}. Give {key}={runs[0]}.")


def set_aside(output: Path) -> None:
    """Move all that is in the folder into ``before-<n>`` inside it."""
    aside = [(int(found[1]), path) for path in output.iterdir() if (found := ASIDE.fullmatch(path.name))]
    moving, kept = output / MOVING, {LOCK, MOVING, *(path.name for _, path in aside)}
    moving.mkdir(exist_ok=True)
    for path in [path for path in output.iterdir() if path.name not in kept and not path.name.startswith(PARTIAL)]:
        path.rename(moving / path.name)
    target = moving.rename(output / f"before-{max((n for n, _ in aside), default=0) + 1}")
    print_status(f"{output} held another run, which is now in {target.name}/.")
