"""Checkpoints that survive a kill, a full disk and a power failure and include the random state; a graceful end at a signal."""

import errno
import os
import pickle
import re
import shutil
import signal
import sys
import threading
import time
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, cast

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import Tensor

from tercet.distributed.gather import largest, rank
from tercet.errors import InputError, require
from tercet.messages import log_errors, warn_once
from tercet.paths import atomic_write
from tercet.training.lightning_compat import forget_pending_batches, keep_signal_handlers, restart_validation

LAST = "last.ckpt"


class LastCheckpoint(ModelCheckpoint):
    """Save ``last.ckpt`` every ``save_every`` steps (200) or minutes (``10m``), or every epoch (None), and at interruptions."""

    def __init__(self, dirpath: str, save_every: int | str | None = None) -> None:
        steps, minutes = interval(save_every)
        super().__init__(
            dirpath, "last", save_on_exception=True, auto_insert_metric_name=False, enable_version_counter=False,
            every_n_train_steps=steps, train_time_interval=timedelta(minutes=minutes) if minutes else None,
        )  # fmt: skip
        self.restored = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Repeat a validation that was interrupted, or that was due after the checkpoint's step."""
        super().on_train_start(trainer, pl_module)
        restart_validation(trainer)
        self.restored = True

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Save at an interruption, unless the state of the checkpoint before is restored in part only."""
        if self.restored:
            super().on_exception(trainer, pl_module, exception)


def interval(save_every: int | str | None) -> tuple[int | None, float | None]:
    """Steps and minutes of ``save_every``, one of them None: of "10m" ``(None, 10.0)``."""
    if save_every is None:
        return None, None
    found = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?) ?m", str(save_every))
    if found is None or not float(found[1] or found[2]):
        raise InputError(f"`save_every`={save_every}: a number of steps as 200, of minutes as 10m, or null (every epoch).")
    return (int(found[1]), None) if found[1] else (None, float(found[2]))


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write checkpoints beside the old file, sync, and rename; keep ``keep_last`` generations of ``last.ckpt``.

    ``last-1.ckpt`` is the one before. Where a checkpoint cannot be written, which is checked before if the disk has no room
    for another one of the last one's size, a warning is printed and training goes on; the next save tries again.
    """

    def __init__(self, keep_last: int = 2) -> None:
        require(keep_last >= 1, f"`keep_last`={keep_last}: 1 or more last checkpoints.")
        self.keep_last = keep_last

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write the whole file, or leave it as it was."""
        file = Path(path)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            old = file if file.is_file() else file.with_name(LAST)
            if old.is_file() and shutil.disk_usage(file.parent).free < old.stat().st_size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
            with atomic_write(file) as partial:
                _save(checkpoint, partial)
                if file.name == LAST:
                    self._rotate(file)
        except OSError as error:
            warn_once(f"{file} could not be written ({error.strerror}); training goes on, and the next save tries again.")

    def _rotate(self, file: Path) -> None:
        for older, newer in pairwise(reversed(generations(file.parent, self.keep_last))):
            if newer.exists():  # a second name for the file: there is a last.ckpt at every moment
                older.unlink(missing_ok=True)
                try:
                    os.link(newer, older)
                except OSError:  # not every file system has hard links
                    with log_errors(f"{older}"), atomic_write(older) as partial:
                        shutil.copyfile(newer, partial)


class _Stream:
    """A file for ``torch.save``, which raises a RuntimeError in place of the file's ``error``."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write to the file; the first error is kept."""
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        """Nothing: the file is flushed at the end."""


def _save(content: dict[str, Any], path: Path) -> None:
    with path.open("wb") as file:
        stream = _Stream(file)
        try:
            torch.save(content, stream)  # type: ignore[arg-type]
        except RuntimeError:
            if stream.error is not None:
                raise stream.error from None
            raise
        file.flush()
        os.fsync(file.fileno())


def generations(folder: Path, keep: int) -> list[Path]:
    """The paths of the last checkpoints, the newest first."""
    return [folder / LAST, *(folder / f"last-{i}.ckpt" for i in range(1, keep))]


class Settings(pl.Callback):
    """Write a run's settings, plain values, into its checkpoints."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings

    def state_dict(self) -> dict[str, Any]:
        """The settings."""
        return {"settings": self.settings}

    @classmethod
    def read(cls, checkpoint: dict[str, Any]) -> dict[str, Any] | None:
        """The settings in a checkpoint; None in one of an earlier version."""
        found: dict[str, Any] = checkpoint.get("callbacks", {}).get(cls.__qualname__, {})
        return found.get("settings")


class RNGState(pl.Callback):
    """Save torch's random state after the last optimizer step in checkpoints, and restore it before the first step.

    The batches of an incompletely accumulated gradient are drawn again. A checkpoint has the first process's state; each other
    process writes its own beside it, ``random-<rank>.pt``. One of another step is replaced by a draw from the first process's.
    """

    def __init__(self) -> None:
        self.loaded: dict[str, Tensor] = {}
        self.state: dict[str, Tensor] = {}
        self.pending = 0  # batches since the last optimizer step
        self.file = Path()  # of this process, if it is not the first

    def state_dict(self) -> dict[str, Any]:
        """The state after the last optimizer step; an interrupted step will be repeated."""
        if rank() and self.state:
            with log_errors(str(self.file)):
                self.file.parent.mkdir(parents=True, exist_ok=True)
                with atomic_write(self.file) as partial:
                    _save(self.state, partial)
        return self.state or self.loaded

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state for the first step: what is built until then draws random numbers, too."""
        self.loaded = dict(state_dict)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Restore a loaded state once; record the state before each step."""
        self.file = Path(trainer.default_root_dir, "checkpoints", f"random-{rank()}.pt")
        if self.loaded:
            self._restore()
        self._record(trainer, batch_idx % trainer.accumulate_grad_batches)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Record the state after each optimizer step."""
        self._record(trainer, 0 if trainer.is_last_batch else (batch_idx + 1) % trainer.accumulate_grad_batches)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Subtract the batches of an incompletely accumulated gradient, and an incomplete one, from the saved progress."""
        if "loops" not in checkpoint:
            return
        forget_pending_batches(checkpoint, self.pending)
        if "done" in (state := checkpoint.get(type(trainer.datamodule).__qualname__, {})):  # type: ignore[attr-defined]
            state["done"] -= self.pending

    def _record(self, trainer: pl.Trainer, pending: int) -> None:
        self.pending = pending
        if not pending:
            self.state = {"cpu": torch.get_rng_state(), "step": torch.tensor(trainer.global_step)}
            if torch.cuda.is_available():
                self.state["cuda"] = torch.cuda.get_rng_state()

    def _restore(self) -> None:
        state = self.loaded
        if rank() and self.file.is_file():
            own = self._read_own()
            state = own if own.get("step") == state["step"].cpu() else state
        torch.set_rng_state(state["cpu"].cpu())
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"].cpu())
        if rank() and state is self.loaded:
            warn_once(f"{self.file} is not of this step: process {rank()} goes on with other random numbers.")
            torch.manual_seed(int(torch.randint(1 << 62, (rank(),))[-1]))
        self.loaded = {}

    def _read_own(self) -> dict[str, Tensor]:
        try:
            return cast(dict[str, Tensor], torch.load(self.file, map_location="cpu", weights_only=True))
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            warn_once(f"{self.file} cannot be read ({type(error).__name__}).")
            return {}


class GracefulStop(pl.Callback):
    """Complete the step, save a checkpoint and end the run at SIGTERM or Ctrl-C.

    Lightning would end in the middle of an optimizer step at Ctrl-C, and its processes hang at SIGTERM. Here the signal is
    recorded, and after each step the processes exchange whether one of them has received one. A single process ends at once
    in a validation, which is repeated, and at a second Ctrl-C.
    """

    def __init__(self) -> None:
        self.received = 0  # the number of the first signal
        self.since = 0.0
        self.trainer: pl.Trainer | None = None  # a single process's

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Keep Lightning's handlers away, also where nothing trains."""
        keep_signal_handlers(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Install the handlers; at the end Lightning restores those of before."""
        self.received, self.trainer = 0, trainer if trainer.world_size == 1 else None
        if threading.current_thread() is threading.main_thread():
            if signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:
                signal.signal(signal.SIGTERM, self._receive)
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # otherwise it is ignored, or the user's own
                signal.signal(signal.SIGINT, self._receive)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop where any process has received a signal."""
        if number := largest(self.received):
            _stop(number)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop at a signal that came after the last step."""
        if self.received:
            _stop(self.received)

    def _receive(self, number: int, _: Any) -> None:
        now, first = time.monotonic(), not self.received
        again = self.received == number == signal.SIGINT and now > self.since + 1  # `timeout -s INT` sends two at once
        if first:
            self.received, self.since = number, now
        if self.trainer and (again or (first and self.trainer.validating)):
            _stop(number)
        if first and self.trainer and number == signal.SIGINT and sys.stderr.isatty():
            warn_once("Ctrl-C: the run is saved after this step. Press it again to end now.")


def _stop(number: int) -> None:
    raise KeyboardInterrupt if number == signal.SIGINT else SIGTERMException
