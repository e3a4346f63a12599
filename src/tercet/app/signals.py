"""SIGTERM, Ctrl-C, SLURM's warning and the end of a command, in good order. Imports here are light."""

import atexit
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM  # exit codes
_describe: Callable[[], str] | None = None
HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def terminate(number: int, frame: FrameType | None) -> NoReturn:
    """Handle SIGTERM where no step has to be completed: exit; ``timeout`` and others send it twice."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise SystemExit(TERMINATED)


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Exit at SIGTERM, and in a job of SLURM's at SIGUSR1 (``sbatch --requeue --signal=USR1@120``), which queues it again.

    While a model trains, ``GracefulStop`` handles SIGTERM, also the one that is made of SIGUSR1. Handlers that are there
    already stay, as those of an outer call. In a process that begins with SIGTERM blocked it is let in here.
    """
    asked = False

    def stop_and_requeue(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        if callable(stop := signal.getsignal(signal.SIGTERM)):
            stop(signal.SIGTERM, frame)

    wanted = {signal.SIGTERM: terminate} | ({signal.SIGUSR1: stop_and_requeue} if "SLURM_JOB_ID" in os.environ else {})
    if threading.current_thread() is not threading.main_thread():
        wanted = {}
    ours = {number: handler for number, handler in wanted.items() if signal.getsignal(number) is signal.SIG_DFL}
    for number, handler in ours.items():
        signal.signal(number, handler)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        yield
    except SystemExit:
        if asked and is_first():
            _queue_again()
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for number, handler in ours.items():
            if signal.getsignal(number) is handler:  # after a signal it is ignored
                signal.signal(number, signal.SIG_DFL)


def describe_stop(describe: Callable[[], str] | None) -> None:
    """Set what ``exit_stopped`` adds to "stopped": what is kept, and how to go on. The first to say so speaks; None forgets it.

    So a sweep speaks for its jobs, and a run with stages for each of them.
    """
    global _describe
    _describe = None if describe is None else _describe or describe


def exit_stopped(code: int, command: str) -> NoReturn:
    """Exit after a signal: not with 0, which a scheduler would take for finished. Further signals change nothing."""
    for number in HANDLED:
        signal.signal(number, signal.SIG_IGN)
    if is_first():
        kept = " before training began; there is nothing to keep" if command == "train" else ""
        with suppress(Exception):  # of files that are gone: the exit code is needed all the same
            kept = _describe() if _describe else kept
        print(f"\nstopped{kept}", file=sys.stderr)
    raise SystemExit(code)


@contextmanager
def exit_at_once() -> Iterator[None]:
    """Where the block exits one of several processes, let that end after its exit handlers, before Python is finalized.

    Threads of gloo that drop their last reference to a tensor during that abort the process (pytorch/pytorch issue 190489).
    """
    codes: list[int] = []

    def end() -> None:
        if codes:
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError):  # nobody reads it any more
                    stream.flush()
            os._exit(codes[0])

    atexit.register(end)  # runs after the handlers of all that is loaded from here on
    try:
        yield
    except SystemExit as error:
        torch = sys.modules.get("torch")
        if torch and torch.distributed.is_available() and torch.distributed.is_initialized():
            codes.append(error.code if isinstance(error.code, int) else int(error.code is not None))
        raise


def is_first() -> bool:
    """Whether this is the first of the processes that torchrun or srun have started, or the only one."""
    return os.environ.get("SLURM_PROCID", "0") == os.environ.get("RANK", "0") == "0"


def _queue_again() -> None:
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
        print(f"SLURM queues job {job} again; it will be resumed.", file=sys.stderr)
    except (OSError, subprocess.CalledProcessError) as error:
        why = str(getattr(error, "stderr", "") or error).strip()
        print(f"scontrol requeue {job}: {why}. The same command with resume=true continues the run.", file=sys.stderr)
