"""Checkpoints that survive a kill, a full disk and a power failure, and that include the random state."""

import os
import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor

from tercet.distributed.gather import rank
from tercet.errors import InputError
from tercet.messages import warn_once
from tercet.training.lightning_compat import forget_pending_batches, restart_validation

LAST = "last.ckpt"
RENAMED = {
    "Randomness": "RNGState",
    "Finite": "SkipNonFinite",
    "Last": "LastCheckpoint",
}  # callbacks in checkpoints of version 1


class LastCheckpoint(ModelCheckpoint):
    """Save ``last.ckpt`` every ``save_every`` steps (200) or minutes (``10m``), or every epoch (None), and at interruptions."""

    def __init__(self, dirpath: str, save_every: int | str | None = None) -> None:
        steps, minutes = interval(save_every)
        super().__init__(
            dirpath=dirpath,
            filename="last",
            save_on_exception=True,
            auto_insert_metric_name=False,
            every_n_train_steps=steps,
            train_time_interval=None if minutes is None else timedelta(minutes=minutes),
            enable_version_counter=False,
        )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Repeat a validation that was interrupted, or that was due after the checkpoint's step."""
        super().on_train_start(trainer, pl_module)
        restart_validation(trainer)


def interval(save_every: int | str | None) -> tuple[int | None, float | None]:
    """Steps and minutes of ``save_every``, one of them None.

    >>> interval(200), interval("10m"), interval(None)
    ((200, None), (None, 10.0), (None, None))
    """
    found = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?) ?m", str(save_every or ""))
    if save_every is not None and (found is None or not float(found[1] or found[2])):
        raise InputError(f"`save_every`={save_every}: a number of steps as 200, of minutes as 10m, or null (every epoch).")
    return (int(found[1]), None) if found and found[1] else (None, float(found[2])) if found else (None, None)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write checkpoints beside the old file, sync, and rename; keep ``keep_last`` generations of ``last.ckpt``.

    ``last-1.ckpt`` is the one before ``last.ckpt``. Where a checkpoint cannot be written, a warning is printed and training
    goes on with the older ones.
    """

    def __init__(self, keep_last: int = 2) -> None:
        if keep_last < 1:
            raise InputError(f"`keep_last`={keep_last}: 1 or more last checkpoints.")
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

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint, with present names of callbacks."""
        checkpoint: dict[str, Any] = super().load_checkpoint(path, *args, **kwargs)
        if "callbacks" in checkpoint:
            checkpoint["callbacks"] = {_present_name(key): state for key, state in checkpoint["callbacks"].items()}
        return checkpoint

    def _rotate(self, file: Path) -> None:
        names = generations(file.parent, self.keep_last)
        for older, newer in zip(names[:0:-1], names[-2::-1], strict=True):
            if newer.exists() and newer != file:
                newer.replace(older)
            elif newer.exists():  # a second name for the file: there is a last.ckpt at every moment
                older.unlink(missing_ok=True)
                os.link(newer, older)


def _present_name(key: str) -> str:
    name, brace, rest = key.partition("{")  # ModelCheckpoint adds its settings in braces
    return RENAMED.get(name, name) + brace + rest


def generations(folder: Path, keep: int) -> list[Path]:
    """The paths of the last checkpoints, the newest first."""
    return [folder / LAST, *(folder / f"last-{i}.ckpt" for i in range(1, keep))]


def newest_checkpoint(folder: Path, read: Callable[[Path], Any]) -> Path | None:
    """The newest last checkpoint that ``read`` accepts, with a warning for each newer one; None where there is none."""
    error: InputError | None = None
    for path in (path for path in generations(folder, 100) if path.is_file()):
        if error:
            warn_once(f"{error} The one before it, {path.name}, is used.")
        try:
            read(path)
            return path
        except InputError as refused:
            error = refused
    if error:
        raise error
    return None


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class RNGState(pl.Callback):
    """Save torch's random state in checkpoints and restore it before the first step; Lightning does not.

    The state is that after the last optimizer step, and so is the position in the data: an incompletely accumulated gradient
    (``accumulate_grad_batches``) is not saved, and its batches are drawn again. A checkpoint has the first process's state;
    each other process writes its own beside it, ``random-<rank>.pt``. Where that is not of the checkpoint's step, its state is
    drawn from the first process's, so that no two processes draw alike.
    """

    def __init__(self) -> None:
        self.loaded: dict[str, Tensor] = {}
        self.step = torch.tensor(0)
        self.state: dict[str, Tensor] = {}
        self.pending = 0  # batches since the last optimizer step
        self.folder = Path()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the folder of checkpoints."""
        self.folder = Path(trainer.default_root_dir) / "checkpoints"

    def state_dict(self) -> dict[str, Any]:
        """The state after the last optimizer step; an interrupted step will be repeated."""
        if rank() and self.state:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = self.folder / f".random-{rank()}.pt"
            torch.save({**self.state, "step": self.step}, partial)
            partial.replace(self.folder / f"random-{rank()}.pt")
        return {**self.state, "step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state for the first step: what is built until then draws random numbers, too."""
        self.loaded = dict(state_dict)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Restore a loaded state once; record the state before each step."""
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
            self.state, self.step = _random_state(), torch.tensor(trainer.global_step)

    def _restore(self) -> None:
        path = self.folder / f"random-{rank()}.pt"
        own = torch.load(path, map_location="cpu", weights_only=True) if rank() and path.is_file() else self.loaded
        step, own_step = self.loaded.get("step"), own.get("step")  # None in the oldest checkpoints
        same = step is not None and own_step is not None and torch.equal(own_step.cpu(), step.cpu())
        state = own if same else self.loaded
        torch.set_rng_state(state["cpu"].cpu())
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"].cpu())
        if rank() and state is self.loaded:
            torch.manual_seed(int(torch.randint(1 << 62, (rank(),))[-1]))
        self.loaded = {}


def _random_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})
