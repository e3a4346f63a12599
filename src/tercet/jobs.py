"""The jobs of ``hydra/launcher=joblib``: where a sweep is stopped they have time to save what they have.

Joblib kills its processes at Ctrl-C, and leaves them running where it is ended by SIGTERM itself.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from contextlib import suppress
from multiprocessing.connection import wait
from types import FrameType
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

SAVING = 60  # seconds that stopped jobs have for their checkpoints
PARENT_DIES = 1  # prctl's PR_SET_PDEATHSIG
DEFAULTS: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


class Stopped(Callback):
    """Ctrl-C and SIGTERM go to the jobs first, and count once these have saved and ended."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """In the process that hands out the jobs."""
        if "joblib" in str(config.hydra.launcher._target_):
            for number, default in DEFAULTS.items():
                if signal.getsignal(number) is default:  # else it is ignored, or somebody's own
                    signal.signal(number, _pass_on)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """There is nobody left to tell."""
        for number, default in DEFAULTS.items():
            if signal.getsignal(number) is _pass_on:
                signal.signal(number, default)

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """In the process of a job: a sweep that is killed leaves none behind."""
        if _of_joblib() and sys.platform == "linux":
            ctypes.CDLL(None).prctl(PARENT_DIES, signal.SIGTERM)


def leave() -> None:
    """End the process of a job that was stopped: joblib would give it the next one. Elsewhere nothing is done."""
    if _of_joblib():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(128 + signal.SIGTERM)


def _of_joblib() -> bool:
    return multiprocessing.current_process().name.startswith("LokyProcess")


def _pass_on(number: int, frame: FrameType | None) -> None:
    for known in DEFAULTS:
        signal.signal(known, signal.SIG_IGN)
    jobs = multiprocessing.active_children()
    for job in jobs:
        if job.pid:
            with suppress(ProcessLookupError):
                os.kill(job.pid, signal.SIGTERM)
    running, ends = [job.sentinel for job in jobs], time.monotonic() + SAVING
    while running and (left := ends - time.monotonic()) > 0:
        ended = wait(running, left)
        running = [sentinel for sentinel in running if sentinel not in ended]
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + signal.SIGTERM)
