"""Skip steps with non-finite gradients; warn of collapsed embeddings."""

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
from tercet.training.contrastive import Contrastive
from tercet.types import Batch


class SkipNonFinite(pl.Callback):
    """Skips a step with a gradient that is not finite, and stops after ``patience`` of them in a row.

    Logs ``train/gradient_norm``, before clipping, and ``train/skipped``, how many so far. The rows of skipped batches are
    written to ``skipped.csv`` (step, process, uids). Reading the norm waits for the device once a step. Under fp16, where
    the scaler skips such steps by itself to find its scale, nothing is done.
    """

    def __init__(self, patience: int) -> None:
        if patience < 1:
            raise InputError(f"callback.skip_non_finite.patience={patience}: 1 step in a row, or more.")
        self.patience = patience
        self.skipped = self.row = 0
        self.seen: list[int] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int) -> None:
        """Remember the rows, of all batches whose gradients are added up."""
        self.seen += batch.example_id.tolist()

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """Look at the whole gradient: it is the same in all processes, so that all of them skip."""
        norm = get_total_norm([p.grad for p in pl_module.parameters() if p.grad is not None])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        pl_module.log("train/gradient_norm", norm, batch_size=1)
        rows, self.seen = self.seen, []
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            return
        self.row = 0 if torch.isfinite(norm) else self.row + 1
        if self.row:
            self._skip(trainer, pl_module, rows)
        pl_module.log("train/skipped", float(self.skipped), batch_size=1)

    def _skip(self, trainer: pl.Trainer, pl_module: pl.LightningModule, rows: list[int]) -> None:
        self.skipped += 1
        for parameter in pl_module.parameters():
            parameter.grad = None  # the optimizer passes over it: no moment, no decay
        path = Path(trainer.default_root_dir) / "skipped.csv"
        with path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow([trainer.global_step, rank(), " ".join(map(str, rows))])
        if self.skipped == 1:
            warn_once(f"step {trainer.global_step}: the gradient is not finite. The step is skipped; {path} names its rows.")
        if self.row == self.patience:
            raise InputError(
                f"The gradient is not finite, {self.row} steps in a row up to step {trainer.global_step}: an embedding or "
                "the loss is not. The weights are those before them, in checkpoints/last.ckpt; skipped.csv names the rows. "
                "A smaller optimizer.lr, trainer.gradient_clip_val=1 or trainer.precision=32-true may help."
            )

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints."""
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse."""
        self.skipped = state_dict["skipped"]


class CollapseWarning(pl.Callback):
    """Warns, once, when for ``patience`` looks in a row the batch has lost its spread and the loss is stuck.

    ``train/spread`` (the mean squared distance on the sphere, 2 where directions are even) is below ``spread``, and the
    loss is where equal embeddings put it: at the margin of triplets, or no triplet is active. It does not recover from
    there: the gradient on the sphere is gone too. Looks come as often as the trainer logs.
    """

    def __init__(self, spread: float, patience: int) -> None:
        self.spread = spread
        self.patience = patience
        self.seen = 0

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: pl.Trainer, pl_module: Contrastive, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at what the step logged."""
        if trainer.global_step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        logged = {name: float(x) for name, x in trainer.callback_metrics.items() if name in LOOKED_AT}
        gone = logged.get("train/spread", 2.0) < self.spread
        stuck = getattr(pl_module.loss, "collapsed", None)  # the value that equal embeddings have, where there is one
        at_it = stuck is None or abs(logged["train/loss"] - stuck) < 0.05 * stuck or not logged.get("train/active", 1)
        self.seen = self.seen + 1 if gone and at_it else 0
        if self.seen == self.patience:
            warn_once(
                f"Collapse: at step {trainer.global_step} all embeddings are nearly one point (train/spread="
                f"{logged['train/spread']:.2g}, train/loss={logged['train/loss']:.4g}"
                f"{'' if stuck is None else f'; equal embeddings have {stuck:.4g}'}). Training does not leave it: begin again "
                "with a smaller optimizer.lr, scheduler.warmup=0.1, or an easier loss.mining (semihard or all, not hard)."
            )


LOOKED_AT = ("train/spread", "train/loss", "train/active")
