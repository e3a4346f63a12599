"""Say when everything has become one point."""

from typing import Any

import pytorch_lightning as pl

from tercet.notice import say_once
from tercet.objective.contrastive import Contrastive


class Collapse(pl.Callback):
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
            say_once(
                f"Collapse: at step {trainer.global_step} all embeddings are nearly one point (train/spread="
                f"{logged['train/spread']:.2g}, train/loss={logged['train/loss']:.4g}"
                f"{'' if stuck is None else f'; equal embeddings have {stuck:.4g}'}). Training does not leave it: begin again "
                "with a smaller optimizer.lr, schedule.warmup=0.1, or an easier loss.mining (semihard or all, not hard)."
            )


LOOKED_AT = ("train/spread", "train/loss", "train/active")
