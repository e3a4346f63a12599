"""Sweeps: the search with Optuna, jobs on Ray, and callbacks of Hydra: a summary over seeds, and an orderly stop of jobs."""

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

SAVE_SECONDS = 60  # for stopped jobs to write their checkpoints
PR_SET_PDEATHSIG = 1  # of prctl: the signal that a process gets when its parent ends
DEFAULT_HANDLERS: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


class SweepSummary(Callback):
    """Write ``summary.json`` into the sweep's folder: mean ± sd of each metric over seeds, by setting if there are several."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Summarize the jobs found on disk, and exit with 1 if one of them failed."""
        from tercet.app.commands.compare import summarize_sweep

        if not summarize_sweep(Path(config.hydra.sweep.dir), config.stages):
            raise SystemExit(1)  # the command line sees failures of jobs in its own process only


class StopJobs(Callback):
    """Pass Ctrl-C and SIGTERM on to the jobs of joblib, and wait until they have written their checkpoints."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Install the handlers in the process that starts the jobs."""
        if "joblib" in str(config.hydra.launcher._target_):
            for number, default in DEFAULT_HANDLERS.items():
                if signal.getsignal(number) is default:  # keep a handler of the caller, and SIG_IGN
                    signal.signal(number, _stop_jobs)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Restore the handlers."""
        for number, default in DEFAULT_HANDLERS.items():
            if signal.getsignal(number) is _stop_jobs:
                signal.signal(number, default)

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """In the process of a job: end it when the sweep's process is killed."""
        if _is_joblib_worker() and sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def exit_stopped_job() -> None:
    """End the process of a stopped job if it is a worker of joblib, which would give it the next job."""
    if _is_joblib_worker():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(128 + signal.SIGTERM)


def _is_joblib_worker() -> bool:
    return multiprocessing.current_process().name.startswith("LokyProcess")


def _stop_jobs(number: int, frame: FrameType | None) -> None:
    for handled in DEFAULT_HANDLERS:
        signal.signal(handled, signal.SIG_IGN)
    jobs, end = multiprocessing.active_children(), time.monotonic() + SAVE_SECONDS
    for job in jobs:
        job.terminate()
    for job in jobs:
        job.join(max(0.0, end - time.monotonic()))
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + signal.SIGTERM)
