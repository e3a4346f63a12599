"""Sweeps: the search with Optuna, jobs on Ray, and callbacks of Hydra: a summary over seeds, and an orderly stop of jobs."""

import fcntl
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from contextlib import suppress
from multiprocessing import resource_tracker
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from tercet.app import signals

SAVE_SECONDS = 60  # for stopped jobs to write their checkpoints
RUNNING_JOBS = "TERCET_RUNNING_JOBS"  # the variable that names the file which jobs have locked

_lock: int | None = None  # the handle of that file, in the process of a job
_sweep = 0  # the id of the sweep's process there


class SweepSummary(Callback):
    """Write ``summary.json`` into the sweep's folder: mean ± sd of each metric over seeds, by setting if there are several."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Summarize the jobs found on disk, and exit with 1 if one of them failed."""
        from tercet.app.sweeps.summary import summarize_sweep

        if not summarize_sweep(Path(config.hydra.sweep.dir), config.stages):
            raise SystemExit(1)  # the command line sees failures of jobs in its own process only


class StopJobs(Callback):
    """Pass Ctrl-C and SIGTERM on to the jobs of joblib, and wait until they have written their checkpoints.

    joblib kills all of its processes when one ends. So the process of a stopped job stays, and none gets what is sent to the
    whole group: one without a job would end. Every job has a shared lock on a file, which tells how long jobs run.
    """

    def __init__(self) -> None:
        self.handlers: dict[int, Any] = {}  # of before the sweep

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Install the handlers in the process that starts the jobs, and block signals in those that it starts."""
        if "joblib" in str(config.hydra.launcher._target_):
            sys.warnoptions.append("ignore:resource_tracker:UserWarning")  # about what killed processes have left
            resource_tracker.ensure_running()  # beginning later it would unblock the signals
            handle, os.environ[RUNNING_JOBS] = tempfile.mkstemp()
            os.close(handle)
            numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
            self.handlers = {number: signal.signal(number, _stop_jobs) for number in numbers}
            # Signals are for this thread now; the main one, from which joblib's processes inherit, still handles them.
            threading.Thread(target=threading.Event().wait, daemon=True).start()
            signal.pthread_sigmask(signal.SIG_BLOCK, signals.HANDLED)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Restore the handlers."""
        if path := os.environ.pop(RUNNING_JOBS, None):
            Path(path).unlink(missing_ok=True)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.HANDLED)
            for number, handler in self.handlers.items():
                signal.signal(number, handler)

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """In the process of a job: say that it runs, and stop it when the sweep is killed."""
        global _lock, _sweep
        if multiprocessing.current_process().name.startswith("LokyProcess"):  # joblib's
            from tercet.distributed.processes import end_with_parent

            _lock = os.open(os.environ[RUNNING_JOBS], os.O_RDONLY) if _lock is None else _lock
            fcntl.flock(_lock, fcntl.LOCK_SH)
            _sweep = os.getppid()
            end_with_parent(signal.SIGTERM)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """The process may get another job."""
        if _lock is not None:
            from tercet.distributed.processes import end_with_parent

            fcntl.flock(_lock, fcntl.LOCK_UN)
            end_with_parent()


def end_stopped_job() -> None:
    """Wait for the end of the sweep in the process of a stopped job, if it is one of joblib's."""
    if _lock is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        end = time.monotonic() + SAVE_SECONDS
        fcntl.flock(_lock, fcntl.LOCK_UN)  # closing is not enough: the workers that read its data have the file, too
        while os.getppid() == _sweep and time.monotonic() < end:
            time.sleep(0.1)
        os._exit(signals.TERMINATED)


def _stop_jobs(number: int, frame: FrameType | None) -> NoReturn:
    for handled in (signal.SIGINT, signal.SIGTERM):
        signal.signal(handled, signal.SIG_IGN)
    jobs, end = multiprocessing.active_children(), time.monotonic() + SAVE_SECONDS
    for job in jobs:
        job.terminate()
    with Path(os.environ[RUNNING_JOBS]).open() as file:
        while time.monotonic() < end:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
    for pid in (job.pid for job in jobs if job.pid):  # loky's processes lack `kill`
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    Path(os.environ.pop(RUNNING_JOBS)).unlink()
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(signals.TERMINATED)
