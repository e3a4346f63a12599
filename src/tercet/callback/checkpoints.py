"""Checkpoints that a kill, a full disk or a power cut at any moment leaves usable."""

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

from tercet.error import InputError
from tercet.notice import say_once

LAST = "last.ckpt"


class Last(ModelCheckpoint):
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
        raise InputError(
            f"save_every={save_every}: a number of steps as 200, of minutes as 10m, or null (every epoch)."
        )
    return (int(found[1]), None) if found and found[1] else (None, float(found[2])) if found else (None, None)


class Durable(TorchCheckpointIO):
    """Writes beside the old file, syncs, and renames; ``keep`` of ``last.ckpt`` stay: ``last-1.ckpt`` is the one before.

    What cannot be written is said, and training goes on with the checkpoints that there are.
    """

    def __init__(self, keep: int) -> None:
        if keep < 1:
            raise InputError(f"keep={keep}: 1 or more last checkpoints.")
        self.keep = keep

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
            say_once(f"{file} could not be written ({error}); training goes on, with the checkpoints that there are.")

    def _rotate(self, file: Path) -> None:
        names = generations(file.parent, self.keep)
        for older, newer in zip(names[:0:-1], names[-2::-1], strict=True):
            if newer.exists() and newer != file:
                newer.replace(older)
            elif newer.exists():  # a second name: at no moment is there no last.ckpt
                older.unlink(missing_ok=True)
                os.link(newer, older)


def generations(folder: Path, keep: int) -> list[Path]:
    """Where the last checkpoints are, the newest first."""
    return [folder / LAST, *(folder / f"last-{i}.ckpt" for i in range(1, keep))]


def newest(folder: Path, read: Callable[[Path], Any]) -> Path | None:
    """The newest last checkpoint that ``read`` does not refuse; those that it does are said. None where there is none."""
    refused = None
    for path in (path for path in generations(folder, 100) if path.is_file()):
        if refused:
            say_once(f"{refused} The one before it, {path.name}, is used.")
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
