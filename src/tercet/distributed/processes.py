"""Child processes: they do not get the signals that stop a run, which are for the first process, and end with their parent."""

import atexit
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
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


@contextmanager
def exit_at_once() -> Iterator[None]:
    """Where the block exits one of several processes, end that after its exit handlers, before the interpreter is finalized.

    Threads of gloo that drop their last reference to a tensor during that abort the process (pytorch/pytorch issue 190489).
    """
    try:
        yield
    except SystemExit as error:
        torch = sys.modules.get("torch")
        if torch and torch.distributed.is_available() and torch.distributed.is_initialized():
            atexit.register(_exit_at_once, error.code)
        raise


def _exit_at_once(code: object) -> None:
    atexit.unregister(_exit_at_once)
    atexit._run_exitfuncs()  # the others
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


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
