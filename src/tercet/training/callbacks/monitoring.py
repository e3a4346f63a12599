"""What a run shows and watches: progress bar, speed and memory; non-finite gradients and collapsed embeddings."""

import csv
import resource
import sys
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.callbacks.progress.tqdm_progress import Tqdm
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from tercet.distributed.gather import rank, world_size
from tercet.errors import InputError, require
from tercet.messages import ProgressLines, log_errors, warn_once
from tercet.training.lightning_compat import time_limit
from tercet.types import Batch, TokenBatch, concat_inputs


class SkipNonFinite(pl.Callback):
    """Skip optimizer steps with non-finite gradients, and end the run after ``patience`` of them in a row.

    Logs ``train/gradient_norm``, before clipping, and ``train/skipped``, the number of steps skipped so far. The rows of
    skipped batches are written to ``skipped.csv`` (step, process, example ids). Nothing is skipped under fp16, where the loss
    scaler does so in order to find its scale.
    """

    def __init__(self, patience: int = 5) -> None:
        require(patience >= 1, f"`patience`={patience}: 1 step in a row, or more.")
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
        self.in_a_row = 0 if torch.isfinite(norm) else self.in_a_row + 1  # waits for the device, once a step
        if self.in_a_row:
            self._skip(trainer, pl_module, rows)
        pl_module.log("train/skipped", float(self.skipped), batch_size=1)

    def _skip(self, trainer: pl.Trainer, pl_module: pl.LightningModule, rows: list[int]) -> None:
        self.skipped += 1
        for parameter in pl_module.parameters():
            parameter.grad = None  # the optimizer leaves such parameters out: no momentum, no weight decay
        path = Path(trainer.default_root_dir) / "skipped.csv"
        with log_errors(f"{path}"), path.open("a", newline="", encoding="utf-8") as file:
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
        self.spread, self.patience = spread, patience
        self.in_a_row = 0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Check what the step has logged."""
        if trainer.global_step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        names = ("train/spread", "train/loss", "train/active")
        logged = {name: float(x) for name, x in trainer.callback_metrics.items() if name in names}
        expected = getattr(getattr(pl_module, "loss", None), "collapsed_loss", None)
        small = logged.get("train/spread", 2.0) < self.spread
        constant = expected is None or abs(logged["train/loss"] - expected) < 0.05 * expected
        constant = constant or not logged.get("train/active", 1)
        self.in_a_row = self.in_a_row + 1 if small and constant else 0
        if self.in_a_row == self.patience:
            equal = "" if expected is None else f"; equal embeddings have {expected:.4g}"
            warn_once(
                f"Collapse: at step {trainer.global_step} all embeddings are nearly one point (train/spread is "
                f"{logged['train/spread']:.2g}, train/loss {logged['train/loss']:.4g}{equal}). It does not recover. "
                "Start again with a lower learning rate, a warm-up of 10 % of the steps, or easier mining (semihard or all)."
            )


class Progress(TQDMProgressBar):
    """Lightning's progress bar with the loss and the sentences per second; evaluators show bars of their own.

    Where the output is no terminal there is a line every few ``seconds`` in its place.
    """

    def __init__(self, refresh_rate: int = 1, process_position: int = 0, leave: bool = False, seconds: float = 5.0) -> None:
        super().__init__(refresh_rate, process_position, leave)
        self.seconds = seconds
        self.lines: ProgressLines | None = None

    def init_train_tqdm(self) -> Tqdm:
        """A bar, of a terminal."""
        return super().init_train_tqdm() if sys.stdout.isatty() else Tqdm(disable=True)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin the bar, or the lines."""
        super().on_train_start(trainer, pl_module)
        if not sys.stdout.isatty() and not self.is_disabled:
            self.lines = ProgressLines("step ", trainer.estimated_stepping_batches, "", self.seconds, trainer.global_step)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *batch: Any) -> None:
        """Update the bar, or print a line if it is due."""
        super().on_train_batch_end(trainer, pl_module, *batch)
        if self.lines is not None:
            timer = time_limit(trainer)
            left = max(0.0, timer.time_remaining() or 0.0) / 60 if timer else 0.0
            shown = [f", at most {left:.1f} min left" if timer else ""]
            shown += [f", {name} {value}" for name, value in self.get_metrics(trainer, pl_module).items()]
            self.lines.update(trainer.global_step - self.lines.n, "".join(shown))

    def init_test_tqdm(self) -> Tqdm:
        """No bar: it would count the one dummy batch of an evaluation."""
        return Tqdm(disable=True)

    init_validation_tqdm = init_sanity_tqdm = init_test_tqdm

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """The values beside the bar."""
        shown = (("loss", "train/loss", ".3f"), ("sentences/s", "train/sentences_per_second", ".0f"))
        logged = trainer.callback_metrics
        return {name: format(float(logged[key]), digits) for name, key, digits in shown if key in logged}


class Throughput(pl.Callback):
    """Log ``train/sentences_per_second``, ``train/tokens_per_second`` or ``train/images_per_second``, and the cost of a step.

    ``train/padding`` is the share of computed tokens that are padding, ``train/memory_gb`` the peak (of the device on CUDA,
    else of this process), ``train/waiting`` the share of a step's time that it waits for its batch. Rates are of all processes
    together, exponentially averaged with weight ``smoothing`` of the past. A step lasts from the end of the previous one to its
    own: waiting for data counts, evaluation and checkpoints do not.
    """

    def __init__(self, smoothing: float = 0.9) -> None:
        self.smoothing = smoothing
        self.start = self.waited = 0.0
        self.rates: dict[str, float] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock; again after an evaluation, which belongs to no step."""
        self.start = time.perf_counter()

    on_validation_end = on_train_start

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Measure the time that the step has waited for its batch."""
        self.waited = time.perf_counter() - self.start

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Count the inputs of the step and log its cost."""
        views = pl_module.views(batch) if hasattr(pl_module, "views") else batch
        inputs = concat_inputs(views.views)
        now = time.perf_counter()
        seconds, self.start = now - self.start, now
        text = inputs if isinstance(inputs, TokenBatch) else None
        counts = {"images": len(inputs)} if text is None else {"sentences": len(text), "tokens": len(text.ids)}
        if seconds > 0:
            for name, count in counts.items():
                rate = world_size() * count / seconds
                self.rates[name] = self.smoothing * self.rates.get(name, rate) + (1 - self.smoothing) * rate
                pl_module.log(f"train/{name}_per_second", self.rates[name], batch_size=1)
            pl_module.log("train/waiting", self.waited / seconds, batch_size=1)
        if text is not None:
            computed = pl_module.encoder.execution_for(text).computed_tokens(text.lengths)
            pl_module.log("train/padding", 1 - len(text.ids) / max(computed, 1), batch_size=len(batch))
        pl_module.log("train/memory_gb", peak_memory_gb(), batch_size=len(batch))


def peak_memory_gb() -> float:
    """The peak memory in GB: of the device on CUDA, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, kibibytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
