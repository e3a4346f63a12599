"""Commands in processes of their own, forked from the tests' process, which has imported everything: they start at once."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import pytorch_lightning as pl
import torch

from tercet.app import cli, launch
from tests.end_to_end.conftest import skip_get_mode

METHOD = "spawn" if torch.cuda.is_available() else "fork"  # autograd's threads of a GPU outlive no fork
CONTEXT = multiprocessing.get_context(METHOD)


class Forked:
    """A command that runs in ``folder``, in a process group of its own; ``prepare`` is called in its process first."""

    def __init__(
        self, folder: Path, command: str, overrides: Sequence[str], prepare: Callable[[], None] = lambda: None,
        environment: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.terminal = folder / "terminal.txt"
        self.terminal.write_bytes(b"")
        settings = {"TERCET_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1", **(environment or {})}
        arguments = (folder, self.terminal, command, list(overrides), prepare, settings)
        self.process = CONTEXT.Process(target=_run, args=arguments)
        self.process.start()

    @property
    def pid(self) -> int:
        """Of the process, and of its group."""
        return int(self.process.pid or 0)

    def said(self) -> str:
        """All that it has printed."""
        return self.terminal.read_text()

    def wait_for(self, condition: Callable[[], object], seconds: float = 300) -> None:
        """Until the condition holds; fails where the process has ended before."""
        ends = time.monotonic() + seconds
        while not condition():
            if not self.process.is_alive() or time.monotonic() > ends:
                self._fail()
            time.sleep(0.05)

    def end(self, seconds: float = 60) -> int:
        """Its exit code."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self._fail()
        return int(self.process.exitcode or 0)

    def _fail(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        raise AssertionError(self.said())


class SlowSteps(pl.Callback):
    """Every step takes ``seconds``; the file ``stepping`` in the run's folder says that the second has begun."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        """Wait inside of the step."""
        if trainer.global_step:
            Path(trainer.default_root_dir, "stepping").touch()
        time.sleep(self.seconds)


def descendants(pid: int) -> list[int]:
    """The children of a process, and theirs; not the tracker of multiprocessing, which ends after them."""
    try:
        own = [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        own = [p for p in own if b"resource_tracker" not in Path(f"/proc/{p}/cmdline").read_bytes()]
    except FileNotFoundError:
        return []
    return [*own, *(grandchild for child in own for grandchild in descendants(child))]


def alive(pids: Sequence[int]) -> list[int]:
    """Those that run: not gone, and no zombies."""
    return [pid for pid in pids if _state(pid) not in ("", "Z")]


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _run(
    folder: Path, terminal: Path, command: str, overrides: list[str], prepare: Callable[[], None], settings: dict[str, str]
) -> None:
    os.setsid()
    for handle, path in ((0, os.devnull), (1, terminal), (2, terminal)):
        os.dup2(os.open(path, os.O_RDWR | os.O_APPEND), handle)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)  # not pytest's
    os.chdir(folder)
    os.environ.update(settings)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background ignores it
    launch.START_METHOD = METHOD
    skip_get_mode()
    prepare()
    cli.main(command, overrides)
