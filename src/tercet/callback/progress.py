"""The progress bar."""

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.callbacks.progress.tqdm_progress import Tqdm


class Progress(TQDMProgressBar):
    """Lightning's bar with the loss and the sentences per second; evaluations show a bar of their own."""

    def init_test_tqdm(self) -> Tqdm:
        """A bar over evaluators would stand at 0 of 1."""
        return Tqdm(disable=True)

    def init_validation_tqdm(self) -> Tqdm:
        """As for tests."""
        return Tqdm(disable=True)

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """What stands behind the bar."""
        seen = trainer.callback_metrics
        shown: dict[str, Any] = {}
        if "train/loss" in seen:
            shown["loss"] = f"{float(seen['train/loss']):.3f}"
        if "train/sentences_per_second" in seen:
            shown["sentences/s"] = f"{float(seen['train/sentences_per_second']):.0f}"
        return shown
