"""The progress bar, and the speed, padding and memory of a step."""

import resource
import sys
import time
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.callbacks.progress.tqdm_progress import Tqdm

from tercet.distributed.gather import world_size
from tercet.types import Batch, Inputs, TokenBatch, concat_inputs


class Progress(TQDMProgressBar):
    """Lightning's progress bar with the loss and the sentences per second; evaluators show bars of their own."""

    def init_test_tqdm(self) -> Tqdm:
        """No bar: it would count the one dummy batch of an evaluation."""
        return Tqdm(disable=True)

    init_validation_tqdm = init_test_tqdm

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """The values beside the bar."""
        logged = trainer.callback_metrics
        shown: dict[str, Any] = {}
        if "train/loss" in logged:
            shown["loss"] = f"{float(logged['train/loss']):.3f}"
        if "train/sentences_per_second" in logged:
            shown["sentences/s"] = f"{float(logged['train/sentences_per_second']):.0f}"
        return shown


class Throughput(pl.Callback):
    """Log the cost of a step.

    Of texts ``train/sentences_per_second``, ``train/tokens_per_second`` and ``train/padding`` (the share of computed tokens
    that are padding), of images ``train/images_per_second``; ``train/memory_gb``, the peak (of the device on CUDA, else of this
    process); and ``train/waiting``, the share of a step's time that it waits for its batch.

    Rates are of all processes together, exponentially averaged with weight ``smoothing`` of the past. A step lasts from the end
    of the previous one to its own: waiting for data counts, evaluation and checkpoints do not.
    """

    def __init__(self, smoothing: float = 0.9) -> None:
        self.smoothing = smoothing
        self.start: float | None = None
        self.waited = 0.0
        self.rates: dict[str, float] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self.start = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock again: an evaluation belongs to no step."""
        self.start = time.perf_counter()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Measure the time that the step has waited for its batch."""
        now = time.perf_counter()
        self.waited = now - (self.start or now)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Count the inputs of the step and log its cost."""
        views = pl_module.views(batch) if hasattr(pl_module, "views") else batch
        inputs = concat_inputs(views.views)
        now = time.perf_counter()
        seconds = now - (self.start or now)
        self.start = now
        if seconds > 0:
            self._log_rates(pl_module, inputs, seconds)
            pl_module.log("train/waiting", self.waited / seconds, batch_size=1)
        if isinstance(inputs, TokenBatch):
            computed = pl_module.encoder.execution_for(inputs).computed_tokens(inputs.lengths)
            pl_module.log("train/padding", 1 - len(inputs.ids) / max(computed, 1), batch_size=len(batch))
        pl_module.log("train/memory_gb", peak_memory_gb(), batch_size=len(batch))

    def _log_rates(self, pl_module: pl.LightningModule, inputs: Inputs, seconds: float) -> None:
        counts = {"images": len(inputs)}
        if isinstance(inputs, TokenBatch):
            counts = {"sentences": len(inputs), "tokens": len(inputs.ids)}
        for name, count in counts.items():
            now = world_size() * count / seconds
            self.rates[name] = self.smoothing * self.rates.get(name, now) + (1 - self.smoothing) * now
            pl_module.log(f"train/{name}_per_second", self.rates[name], batch_size=1)


def peak_memory_gb() -> float:
    """The peak memory in GB: of the device on CUDA, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, kibibytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
