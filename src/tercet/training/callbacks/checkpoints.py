"""Checkpoints that survive a kill, a full disk and a power failure and include the random state; a graceful end at a signal."""

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import Tensor

from tercet.distributed.gather import rank
from tercet.errors import InputError, require
from tercet.messages import warn_once
from tercet.training.lightning_compat import forget_pending_batches, keep_signal_handlers, restart_validation

LAST = "last.ckpt"


class LastCheckpoint(ModelCheckpoint):
    """Save ``last.ckpt`` every ``save_every`` steps (200) or minutes (``10m``), or every epoch (None), and at interruptions."""

    def __init__(self, dirpath: str, save_every: int | str | None = None) -> None:
        steps, minutes = interval(save_every)
        super().__init__(
            dirpath, "last", save_on_exception=False, auto_insert_metric_name=False, enable_version_counter=False,
            every_n_train_steps=steps, train_time_interval=timedelta(minutes=minutes) if minutes else None,
        )  # fmt: skip

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Repeat a validation that was interrupted, or that was due after the checkpoint's step."""
        super().on_train_start(trainer, pl_module)
        restart_validation(trainer)
        self.save_on_exception = True  # until here the state may be restored in part


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

    ``last-1.ckpt`` is the one before. Where a checkpoint cannot be written, a warning is printed and training goes on.
    """

    def __init__(self, keep_last: int = 2) -> None:
        require(keep_last >= 1, f"`keep_last`={keep_last}: 1 or more last checkpoints.")
        self.keep_last = keep_last

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write the whole file, or leave it as it was."""
        file = Path(path)
        partial = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as stream:
                torch.save(checkpoint, stream)
                stream.flush()
                os.fsync(stream.fileno())
            if file.name == LAST:
                self._rotate(file)
            partial.replace(file)
            _sync(file.parent)
        except (OSError, RuntimeError) as error:
            partial.unlink(missing_ok=True)
            if not isinstance(error, OSError) and "StreamWriter" not in str(error):  # torch's message at a full disk
                raise
            warn_once(f"{file} could not be written ({error}); training goes on with the checkpoints that exist.")

    def _rotate(self, file: Path) -> None:
        for older, newer in pairwise(reversed(generations(file.parent, self.keep_last))):
            if newer.exists():  # a second name for the file: there is a last.ckpt at every moment
                older.unlink(missing_ok=True)
                os.link(newer, older)


def generations(folder: Path, keep: int) -> list[Path]:
    """The paths of the last checkpoints, the newest first."""
    return [folder / LAST, *(folder / f"last-{i}.ckpt" for i in range(1, keep))]


def newest_checkpoint(folder: Path, read: Callable[[Path], Any]) -> Path | None:
    """The newest last checkpoint that ``read`` accepts, with a warning for each newer one; None where there is none."""
    found = [path for path in generations(folder, 100) if path.is_file()]
    for i, path in enumerate(found, 1):
        older = found[i:]
        try:
            read(path)
            return path
        except InputError as error:
            if not older:
                raise
            warn_once(f"{error} The one before it, {older[0].name}, is used.")
    return None


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
            AtomicCheckpointIO().save_checkpoint(self.state, self.file)
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
        """Subtract the batches of an incompletely accumulated gradient from the saved progress."""
        if not self.pending or "loops" not in checkpoint:
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
            own = torch.load(self.file, map_location="cpu", weights_only=True)
            if own["step"] == state["step"].cpu():
                state = own
        torch.set_rng_state(state["cpu"].cpu())
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"].cpu())
        if rank() and state is self.loaded:
            torch.manual_seed(int(torch.randint(1 << 62, (rank(),))[-1]))
        self.loaded = {}


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

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Stop at a signal that came between the steps of a single process."""
        if self.received and self.trainer:
            _stop(self.received)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop where any process has received a signal."""
        number = self.received
        if not self.trainer:
            received = torch.tensor(number, device=trainer.strategy.root_device)
            number = int(trainer.strategy.reduce(received, reduce_op="max"))
        if number:
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
