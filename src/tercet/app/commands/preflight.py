"""``check=true``: run three steps and an evaluation, and estimate the time, memory and disk space of the whole run."""

import math
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig

from tercet.app.components import build
from tercet.errors import InputError
from tercet.messages import print_status
from tercet.models import CachedEncoder
from tercet.training.callbacks.evaluation import Evaluation, refresh_encoder, run_evaluator
from tercet.training.callbacks.throughput import peak_memory_gb
from tercet.training.contrastive import Contrastive
from tercet.training.datamodule import DataModule
from tercet.types import Evaluator, Item

STEPS = 3  # the first is not timed: it allocates
SAMPLE = 256  # items that an evaluation encodes


class StepTimer(pl.Callback):
    """Records when each step ended, and the last loss."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.loss = math.nan

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Record the time."""
        self.loss = float(trainer.callback_metrics["train/loss"])
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        """The mean time of a step, without the first."""
        return (self.ends[-1] - self.ends[0]) / max(1, len(self.ends) - 1)


class SampledEncoder:
    """An encode function that encodes the first ``SAMPLE`` items and returns random vectors for the others.

    ``items`` are the distinct ones that it was called with; ``seconds`` is the time for the ``encoded`` ones.
    """

    def __init__(self, encode: CachedEncoder) -> None:
        self.encode = encode
        self.items: set[Item] = set()
        self.seconds = 0.0
        self.encoded = 0

    @property
    def num_outputs(self) -> int:
        """The number of outputs of the encoder."""
        return self.encode.num_outputs

    def __call__(self, items: Sequence[Item]) -> torch.Tensor:
        """Embed N items: ``(N, D)``."""
        start = time.perf_counter()
        own = list(items[: max(2, SAMPLE - self.encoded)])
        z = self.encode(own)
        if new := len(set(own) - self.items):
            self.seconds, self.encoded = self.seconds + time.perf_counter() - start, self.encoded + new
        self.items |= set(items)
        random = torch.randn(len(items) - len(own), z.shape[1], generator=torch.Generator().manual_seed(0))
        return torch.cat([z, torch.nn.functional.normalize(random, dim=-1)])


def preflight(cfg: DictConfig, objective: Contrastive, data: DataModule, evaluation: Evaluation, output: Path) -> None:
    """Train three steps, evaluate once in every process, and print what the run will take."""
    timed = StepTimer()
    quick = {"max_steps": STEPS, "max_epochs": -1, "limit_val_batches": 0, "enable_checkpointing": False,
             "enable_progress_bar": False, "enable_model_summary": False, "accumulate_grad_batches": 1}  # fmt: skip
    trainer: pl.Trainer = build(cfg.trainer, logger=False, callbacks=[timed], default_root_dir=str(output), **quick)
    trainer.fit(objective, datamodule=data)
    if not math.isfinite(timed.loss):
        raise InputError(f"check: the loss is {timed.loss} after {len(timed.ends)} steps.")
    sampled = SampledEncoder(refresh_encoder(trainer, objective))
    steps = total_steps(cfg, data)
    items = validations(cfg, steps, data) * count_items(evaluation.validation, sampled, objective)
    items += (2 if cfg.measure_before else 1) * count_items(evaluation.test, sampled, objective)
    each = sampled.seconds / max(1, sampled.encoded)
    evaluating = each * items
    parameters = sum(p.numel() for p in objective.parameters())
    trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    lines = {
        "data": "a stream" if data.dataset is None else f"{len(data.dataset):,} rows of {len(data.columns)} columns",
        "model": f"{parameters / 1e6:.1f} M parameters, {trained / 1e6:.1f} M of them trained",
        "training": f"{steps} steps of {data.batch_size}, {timed.seconds:.2f} s each: {format_duration(steps * timed.seconds)}"
        f"; the loss after {len(timed.ends)} is {timed.loss:.4f}",
        "measuring": f"{items:,} texts or images, {1000 * each:.1f} ms each: {format_duration(evaluating)}, scoring aside",
        "memory": f"{peak_memory_gb():.1f} GB so far, on {trainer.strategy.root_device}, {trainer.world_size} processes",
        "writes": f"{output}: model/ {4 * parameters / 1e6:.0f} MB, checkpoints/ of {12 * trained / 1e6:.0f} MB, "
        f"{cfg.keep_last} last and {1 if cfg.monitor else 0} best",
        "in all": f"about {format_duration(steps * timed.seconds + evaluating)}",
    }  # fmt: skip
    print_status("\ncheck passed; nothing is kept\n" + "\n".join(f"  {name:10} {text}" for name, text in lines.items()))
    if trainer.is_global_zero:
        with suppress(OSError):  # it holds other files
            output.rmdir()


def count_items(evaluator: Evaluator | None, sampled: SampledEncoder, objective: Contrastive) -> int:
    """The number of distinct items that the evaluator encodes."""
    sampled.items = set()
    if evaluator is not None:
        run_evaluator(evaluator, objective, sampled)
    return len(sampled.items)


def total_steps(cfg: DictConfig, data: DataModule) -> int:
    """The number of steps of the whole run."""
    given, epochs = cfg.trainer.max_steps, cfg.trainer.max_epochs
    if data.sampler is None or epochs in (None, -1):
        return int(given)
    batches = len(data.sampler) // cfg.trainer.accumulate_grad_batches  # type: ignore[arg-type]
    return int(batches * epochs if given == -1 else min(given, batches * epochs))


def validations(cfg: DictConfig, steps: int, data: DataModule) -> int:
    """The number of validations of the whole run."""
    every = cfg.trainer.val_check_interval
    if isinstance(every, int):
        return steps // every
    epoch = steps if data.sampler is None else len(data.sampler)  # type: ignore[arg-type]
    return max(1, round(steps / max(1.0, epoch * (every or 1.0))))


def format_duration(seconds: float) -> str:
    """Seconds as text: ``40 s``, ``12 min``, ``2.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
