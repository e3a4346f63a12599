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
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from tercet.distributed.gather import rank, world_size
from tercet.errors import InputError, require
from tercet.messages import ProgressLines, log_errors, warn_once
from tercet.training.lightning_compat import logs_now, skip_on_device, time_limit
from tercet.types import Batch, TokenBatch, runs_on_cpu


class SkipNonFinite(pl.Callback):
    """Skip optimizer steps with non-finite gradients, and end the run after ``patience`` of them in a row.

    Logs ``train/gradient_norm``, before clipping, and ``train/skipped``, the number of steps skipped so far. The rows of
    skipped batches are written to ``skipped.csv`` (step, process, example ids). Nothing is skipped under fp16, where the loss
    scaler does so in order to find its scale. On a GPU the optimizer skips by itself where it can, and the host counts such
    steps when values are logged: until then it does not wait for the device.
    """

    def __init__(self, patience: int = 5) -> None:
        require(patience >= 1, f"`patience`={patience}: 1 step in a row, or more.")
        self.patience = patience
        self.skipped = self.in_a_row = 0
        self.rows: list[int] = []
        self.unread: list[tuple[int, list[int], Tensor]] = []  # step, example ids, whether it is skipped
        self.folder = Path()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int) -> None:
        """Record the rows of all batches whose gradients are accumulated."""
        self.folder = Path(trainer.default_root_dir)
        self.rows += batch.readable_id.tolist()

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """Check the norm of the whole gradient: it is the same in all processes, so that all of them skip."""
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        total = get_total_norm([p.grad for p in trained if p.grad is not None])
        norm = total.full_tensor() if isinstance(total, DTensor) else total
        if logs := logs_now(trainer):
            pl_module.log("train/gradient_norm", norm, batch_size=1)
        rows, self.rows = self.rows, []
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            return
        skip = ~torch.isfinite(norm)
        self.unread.append((trainer.global_step, rows, skip))
        on_device = not runs_on_cpu(norm.device) and skip_on_device(optimizer, skip)
        # Clipping needs the norm as well; by NaN it would make a gradient of zeros NaN.
        pl_module.gradient_norm = total.masked_fill(skip, 0) if on_device and not isinstance(total, DTensor) else total
        if not on_device and skip:  # waits for the device
            for parameter in trained:
                parameter.grad = None  # the optimizer leaves such parameters out: no momentum, no weight decay
        if logs or not on_device:
            self._count()
        if logs:
            pl_module.log("train/skipped", float(self.skipped), batch_size=1)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count the last steps."""
        self._count()

    def _count(self) -> None:
        """Count the steps that have been skipped since the last call; ``InputError`` where ``patience`` is at its end."""
        flags = torch.stack([skip for _, _, skip in self.unread]).tolist() if self.unread else []
        unread, self.unread = self.unread, []
        for (step, rows, _), skipped in zip(unread, flags, strict=True):
            self.in_a_row = self.in_a_row + 1 if skipped else 0
            if skipped:
                self._record(step, rows)

    def _record(self, step: int, rows: list[int]) -> None:
        self.skipped += 1
        path = self.folder / "skipped.csv"
        with log_errors(f"{path}"), path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow([step, rank(), " ".join(map(str, rows))])
        if self.skipped == 1:
            warn_once(f"step {step}: the gradient is not finite. The step is skipped; {path} names its rows.")
        if self.in_a_row == self.patience:
            raise InputError(
                f"The gradient is not finite, {self.in_a_row} steps in a row up to step {step} (`patience`): "
                "an embedding or the loss is not. The weights are those before them, in checkpoints/last.ckpt; skipped.csv has "
                "the rows. A lower learning rate, the Trainer's gradient_clip_val at 1 or its precision 32-true may help."
            )

    def state_dict(self) -> dict[str, Any]:
        """The number of skipped steps."""
        self._count()
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
        if trainer.global_step % trainer.log_every_n_steps or not logs_now(trainer):  # type: ignore[attr-defined]
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
        self.shown: dict[str, Any] = {}

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
        if logs_now(trainer):
            wanted = (("loss", "train/loss", ".3f"), ("sentences/s", "train/sentences_per_second", ".0f"))
            logged = trainer.callback_metrics
            self.shown = {name: format(float(logged[key]), digits) for name, key, digits in wanted if key in logged}
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
        """The values beside the bar: those of the last step that logged any, because reading them waits for the device."""
        return self.shown


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
        """Count the inputs of the step, and log its cost in steps whose values are written."""
        now = time.perf_counter()
        seconds, self.start = now - self.start, now
        inputs = getattr(pl_module, "prepared", batch).inputs
        texts = inputs if isinstance(inputs, TokenBatch) else None
        counts = {"sentences": len(texts), "tokens": int(texts.lengths.sum())} if texts else {"images": len(inputs)}
        for name, count in counts.items() if seconds > 0 else ():
            rate = world_size() * count / seconds
            self.rates[name] = self.smoothing * self.rates.get(name, rate) + (1 - self.smoothing) * rate
        if not logs_now(trainer):
            return
        cost = {f"{name}_per_second": rate for name, rate in self.rates.items()}
        cost |= {"waiting": self.waited / seconds} if seconds > 0 else {}
        if texts:
            computed = pl_module.encoder.execution_for(texts).computed_tokens(texts.lengths)
            cost["padding"] = 1 - counts["tokens"] / max(computed, 1)
        pl_module.log_dict({f"train/{name}": x for name, x in {**cost, "memory_gb": peak_memory_gb()}.items()}, batch_size=1)


def peak_memory_gb() -> float:
    """The peak memory in GB: of the device on CUDA, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, kibibytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
