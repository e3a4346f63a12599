"""Checkpoints that survive a kill, a full disk or a power cut, with the random state."""

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
from pytorch_lightning.loops.evaluation_loop import RestartStage
from torch import Tensor

from tercet.distributed.gather import rank
from tercet.errors import InputError
from tercet.messages import warn_once

LAST = "last.ckpt"


class LastCheckpoint(ModelCheckpoint):
    """``last.ckpt`` every ``save_every`` steps (200) or minutes (10m), null: every epoch; and when a run is stopped."""

    def __init__(self, dirpath: str, save_every: int | str | None) -> None:
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
        """A validation that a stop has cut off, or that was due after the checkpoint's step, is made from its beginning.

        Lightning takes the latter for made, and goes on in the middle of the former without what was measured before.
        """
        super().on_train_start(trainer, pl_module)
        loop = trainer.fit_loop.epoch_loop
        if loop.restarted_on_train_batch_end or loop.val_loop.restarted_mid_evaluation:
            loop.val_loop.batch_progress.reset_on_run()
            loop.val_loop._restart_stage = RestartStage.RESTARTED_MID_EVALUATION


def interval(save_every: int | str | None) -> tuple[int | None, float | None]:
    """``200`` to steps, ``10m`` to minutes."""
    found = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?) ?m", str(save_every or ""))
    if save_every is not None and (found is None or not float(found[1] or found[2])):
        raise InputError(f"save_every={save_every}: a number of steps as 200, of minutes as 10m, or null (every epoch).")
    return (int(found[1]), None) if found and found[1] else (None, float(found[2])) if found else (None, None)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the old file, syncs, and renames; ``keep`` of ``last.ckpt`` stay: ``last-1.ckpt`` is the one before.

    What cannot be written is said, and training goes on with the checkpoints that there are.
    """

    def __init__(self, keep_last: int) -> None:
        if keep_last < 1:
            raise InputError(f"keep={keep_last}: 1 or more last checkpoints.")
        self.keep_last = keep_last

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """The file is there whole, or as it was."""
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
            if not isinstance(error, OSError) and "StreamWriter" not in str(error):  # torch's word for a full disk
                raise
            warn_once(f"{file} could not be written ({error}); training goes on, with the checkpoints that there are.")

    def _rotate(self, file: Path) -> None:
        names = generations(file.parent, self.keep_last)
        for older, newer in zip(names[:0:-1], names[-2::-1], strict=True):
            if newer.exists() and newer != file:
                newer.replace(older)
            elif newer.exists():  # a second name: at no moment is there no last.ckpt
                older.unlink(missing_ok=True)
                os.link(newer, older)


def generations(folder: Path, keep: int) -> list[Path]:
    """Where the last checkpoints are, the newest first."""
    return [folder / LAST, *(folder / f"last-{i}.ckpt" for i in range(1, keep))]


def newest_checkpoint(folder: Path, read: Callable[[Path], Any]) -> Path | None:
    """The newest last checkpoint that ``read`` does not refuse; those that it does are said. None where there is none."""
    refused = None
    for path in (path for path in generations(folder, 100) if path.is_file()):
        if refused:
            warn_once(f"{refused} The one before it, {path.name}, is used.")
        refused = _refused(path, read)
        if refused is None:
            return path
    if refused:
        raise refused
    return None


def _refused(path: Path, read: Callable[[Path], Any]) -> InputError | None:
    try:
        read(path)
    except InputError as error:
        return error
    return None


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class RNGState(pl.Callback):
    """Keeps torch's random state in checkpoints and puts it back before the first step; Lightning keeps none.

    It is that of the last step, and so is the place in the data: a gradient that is still being added up
    (``accumulate_grad_batches``) is not kept, and its batches will be drawn again. A checkpoint holds the first process's
    state; each of the others writes its own beside it, ``random-<rank>.pt``. Where that is not of the checkpoint's step
    they draw what they start with from the first one's: no two draw alike.
    """

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}
        self.step = torch.tensor(0)
        self.kept: dict[str, Tensor] = {}
        self.pending = 0  # batches since the last step
        self.folder = Path()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Where the checkpoints are."""
        self.folder = Path(trainer.default_root_dir) / "checkpoints"

    def state_dict(self) -> dict[str, Any]:
        """As it was between the last two steps: one that is interrupted will be made again."""
        if rank() and self.kept:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = self.folder / f".random-{rank()}.pt"
            torch.save({**self.kept, "step": self.step}, partial)
            partial.replace(self.folder / f"random-{rank()}.pt")
        return {**self.kept, "step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Not put back yet: what is built until the first step draws, too."""
        self.found = dict(state_dict)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Put back once; kept for each step."""
        if self.found:
            self._put_back()
        self._keep(trainer, batch_idx % trainer.accumulate_grad_batches)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The step is made, or one batch nearer."""
        self._keep(trainer, 0 if trainer.is_last_batch else (batch_idx + 1) % trainer.accumulate_grad_batches)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Lightning counts every batch; those of a gradient that is not kept are taken back."""
        if not self.pending or "loops" not in checkpoint:
            return
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):
            counts.update(dict.fromkeys(counts, counts["processed"] - self.pending))
        if "done" in (place := checkpoint.get(type(trainer.datamodule).__qualname__, {})):  # type: ignore[attr-defined]
            place["done"] -= self.pending

    def _keep(self, trainer: pl.Trainer, pending: int) -> None:
        self.pending = pending
        if not pending:
            self.kept, self.step = _states(), torch.tensor(trainer.global_step)

    def _put_back(self) -> None:
        own = self.folder / f"random-{rank()}.pt"
        mine = torch.load(own, map_location="cpu", weights_only=True) if rank() and own.is_file() else self.found
        step, own_step = self.found.get("step"), mine.get("step")  # None in checkpoints of before this was kept
        same = step is not None and own_step is not None and torch.equal(own_step.cpu(), step.cpu())
        states = mine if same else self.found
        torch.set_rng_state(states["cpu"].cpu())
        if "cuda" in states and torch.cuda.is_available():
            torch.cuda.set_rng_state(states["cuda"].cpu())
        if rank() and states is self.found:
            torch.manual_seed(int(torch.randint(1 << 62, (rank(),))[-1]))
        self.found = {}


def _states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})
