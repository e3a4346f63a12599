"""The progress bar, and speed, padding and memory of a step."""

import resource
import sys
import time
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.callbacks.progress.tqdm_progress import Tqdm

from tercet.distributed.gather import world_size
from tercet.training.contrastive import Contrastive
from tercet.types import Batch, Inputs, TokenBatch, concat_inputs


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


class Throughput(pl.Callback):
    """Logs what a step costs.

    ``train/sentences_per_second``, ``train/tokens_per_second`` and ``train/padding`` (the share of computed tokens that
    are padding) of texts, ``train/images_per_second`` of images, ``train/memory_gb`` (peak: of the device on CUDA, of
    this process elsewhere), and ``train/waiting``: the share of its time that a step waits for its batch.

    Rates are over all processes and smoothed over the last steps; a step is timed from the end of the one before it, so
    that waiting for data counts, evaluation and checkpoints do not.
    """

    def __init__(self, smoothing: float) -> None:
        self.smoothing = smoothing
        self.start: float | None = None
        self.waited = 0.0
        self.rates: dict[str, float] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The first step starts now."""
        self.start = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The time of an evaluation belongs to no step."""
        self.start = time.perf_counter()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """The batch is here."""
        now = time.perf_counter()
        self.waited = now - (self.start or now)

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: pl.Trainer, pl_module: Contrastive, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Count what the step has embedded."""
        views = concat_inputs(pl_module.views(batch).views)
        now = time.perf_counter()
        seconds = now - (self.start or now)
        self.start = now
        if seconds > 0:
            self._log_rates(pl_module, views, seconds)
            pl_module.log("train/waiting", self.waited / seconds, batch_size=1)
        if isinstance(views, TokenBatch):
            computed = pl_module.encoder.execution.computed_tokens(views.lengths)
            pl_module.log("train/padding", 1 - len(views.ids) / max(computed, 1), batch_size=len(batch))
        pl_module.log("train/memory_gb", peak_memory_gb(), batch_size=len(batch))

    def _log_rates(self, pl_module: Contrastive, views: Inputs, seconds: float) -> None:
        fresh = {"images": len(views)}
        if isinstance(views, TokenBatch):
            fresh = {"sentences": len(views), "tokens": len(views.ids)}
        for name, count in fresh.items():
            now = world_size() * count / seconds
            self.rates[name] = self.smoothing * self.rates.get(name, now) + (1 - self.smoothing) * now
            pl_module.log(f"train/{name}_per_second", self.rates[name], batch_size=1)


def peak_memory_gb() -> float:
    """The most memory that was held: of the device on CUDA, of this process elsewhere."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, kibibytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
