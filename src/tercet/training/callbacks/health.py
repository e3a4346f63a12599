"""Skip optimizer steps with non-finite gradients; warn of collapsed embeddings."""

import csv
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from tercet.distributed.gather import rank
from tercet.errors import InputError
from tercet.messages import warn_once
from tercet.types import Batch


class SkipNonFinite(pl.Callback):
    """Skip optimizer steps with non-finite gradients, and end the run after ``patience`` of them in a row.

    Logs ``train/gradient_norm``, before clipping, and ``train/skipped``, the number of steps skipped so far. The rows of
    skipped batches are written to ``skipped.csv`` (step, process, example ids). Reading the norm waits for the device once a
    step. Nothing is skipped under fp16, where the loss scaler does so in order to find its scale.
    """

    def __init__(self, patience: int = 5) -> None:
        if patience < 1:
            raise InputError(f"`patience`={patience}: 1 step in a row, or more.")
        self.patience = patience
        self.skipped = self.in_a_row = 0
        self.rows: list[int] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int) -> None:
        """Record the rows of all batches whose gradients are accumulated."""
        self.rows += batch.example_id.tolist()

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """Check the norm of the whole gradient: it is the same in all processes, so that all of them skip."""
        norm = get_total_norm([p.grad for p in pl_module.parameters() if p.grad is not None])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        pl_module.log("train/gradient_norm", norm, batch_size=1)
        rows, self.rows = self.rows, []
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            return
        self.in_a_row = 0 if torch.isfinite(norm) else self.in_a_row + 1
        if self.in_a_row:
            self._skip(trainer, pl_module, rows)
        pl_module.log("train/skipped", float(self.skipped), batch_size=1)

    def _skip(self, trainer: pl.Trainer, pl_module: pl.LightningModule, rows: list[int]) -> None:
        self.skipped += 1
        for parameter in pl_module.parameters():
            parameter.grad = None  # the optimizer leaves such parameters out: no momentum, no weight decay
        path = Path(trainer.default_root_dir) / "skipped.csv"
        with path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow([trainer.global_step, rank(), " ".join(map(str, rows))])
        if self.skipped == 1:
            warn_once(f"step {trainer.global_step}: the gradient is not finite. The step is skipped; {path} names its rows.")
        if self.in_a_row == self.patience:
            raise InputError(
                f"The gradient is not finite, {self.in_a_row} steps in a row up to step {trainer.global_step} (`patience`): "
                "an embedding or the loss is not. The weights are those before them, in checkpoints/last.ckpt; skipped.csv has "
                "the rows. A lower learning rate, the Trainer's gradient_clip_val at 1 or its precision 32-true may help."
            )

    def state_dict(self) -> dict[str, Any]:
        """The number of skipped steps."""
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the number of skipped steps."""
        self.skipped = state_dict["skipped"]


class CollapseWarning(pl.Callback):
    """Warn, once, when the embeddings have collapsed: little spread and a constant loss, ``patience`` times in a row.

    ``train/spread`` (the mean squared distance on the unit sphere, 2 for evenly distributed directions) is below ``spread``,
    and the loss has the value that equal embeddings have (the loss's ``collapsed_loss``, where it declares one), or no triplet
    is active. Training does not recover: the gradient on the sphere vanishes as well. Checked as often as the trainer logs.
    """

    def __init__(self, spread: float = 0.01, patience: int = 3) -> None:
        self.spread = spread
        self.patience = patience
        self.in_a_row = 0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Check what the step has logged."""
        if trainer.global_step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        logged = {name: float(x) for name, x in trainer.callback_metrics.items() if name in LOGGED}
        collapsed_loss = getattr(getattr(pl_module, "loss", None), "collapsed_loss", None)
        small = logged.get("train/spread", 2.0) < self.spread
        constant = (
            collapsed_loss is None
            or abs(logged["train/loss"] - collapsed_loss) < 0.05 * collapsed_loss
            or not logged.get("train/active", 1)
        )
        self.in_a_row = self.in_a_row + 1 if small and constant else 0
        if self.in_a_row == self.patience:
            warn_once(
                f"Collapse: at step {trainer.global_step} all embeddings are nearly one point (train/spread="
                f"{logged['train/spread']:.2g}, train/loss={logged['train/loss']:.4g}"
                f"{'' if collapsed_loss is None else f'; equal embeddings have {collapsed_loss:.4g}'}). It does not recover. "
                "Start again with a lower learning rate, a warm-up of 10 % of the steps, or easier mining (semihard or all)."
            )


LOGGED = ("train/spread", "train/loss", "train/active")
