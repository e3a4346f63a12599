"""Child processes: they do not get the signals that stop a run, which are for the first process, and end with their parent."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess

STOP_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGUSR1})
PR_SET_PDEATHSIG = 1  # of prctl: the signal that a process gets when its parent ends


@contextmanager
def block_signals() -> Iterator[None]:
    """Block the signals that stop a run; processes that are started inside begin, and stay, without them.

    A terminal, ``timeout`` and schedulers signal the whole process group, but only the first process knows what to save.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_processes(processes: Sequence[BaseProcess]) -> None:
    """Start processes without the signals that stop a run."""
    resource_tracker.ensure_running()  # beginning in between it would unblock them
    with block_signals():
        for process in processes:
            process.start()


def end_with_parent(number: int = signal.SIGKILL) -> None:
    """Let this process get a signal when its parent ends, however that is (on Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
        parent = multiprocessing.parent_process()
        if parent and parent.pid != os.getppid():  # it has ended already
            os.kill(os.getpid(), number)


def start_worker(number: int) -> None:
    """Begin a worker of a ``DataLoader``: only its parent can end it, which does by SIGTERM, and its parent's end does."""
    end_with_parent()
    if hasattr(signal, "sigwaitinfo"):
        threading.Thread(target=_end_by_parent, args=(os.getppid(),), daemon=True).start()
    else:  # on macOS a signal does not tell who sent it
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])


def _end_by_parent(parent: int) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)
