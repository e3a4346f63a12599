"""The progress bar."""

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import TQDMProgressBar


class Progress(TQDMProgressBar):
    """Lightning's bar with the loss and the sentences per second."""

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """What stands behind the bar."""
        seen = trainer.callback_metrics
        shown: dict[str, Any] = {}
        if "train/loss" in seen:
            shown["loss"] = f"{float(seen['train/loss']):.3f}"
        if "train/sentences_per_second" in seen:
            shown["sentences/s"] = f"{float(seen['train/sentences_per_second']):.0f}"
        return shown
