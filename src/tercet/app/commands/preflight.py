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
from pytorch_lightning.callbacks import LambdaCallback, Timer

from tercet.app import launch
from tercet.app.components import build
from tercet.errors import require
from tercet.messages import print_status
from tercet.models import CachedEncoder
from tercet.training.callbacks.evaluation import Evaluation, refresh_encoder, run_evaluator
from tercet.training.callbacks.monitoring import peak_memory_gb
from tercet.training.contrastive import Contrastive
from tercet.training.datamodule import DataModule
from tercet.types import Item

STEPS = 3  # the first is not timed: it allocates
SAMPLE = 256  # items that an evaluation encodes


class SampledEncoder:
    """An encode function that encodes the first ``SAMPLE`` items, in ``seconds``, and returns random vectors for the others.

    ``items`` are the distinct ones that it was called with.
    """

    def __init__(self, encode: CachedEncoder) -> None:
        self.encode, self.num_outputs, self.seconds = encode, encode.num_outputs, 0.0
        self.items: set[Item] = set()

    def __call__(self, items: Sequence[Item]) -> torch.Tensor:
        """Embed N items: ``(N, D)``."""
        start = time.perf_counter()
        z = self.encode(items[: max(2, SAMPLE - len(self.encode.cache))])
        self.seconds += time.perf_counter() - start
        self.items |= set(items)
        random = torch.randn(len(items) - len(z), z.shape[1], generator=torch.Generator().manual_seed(0))
        return torch.cat([z, torch.nn.functional.normalize(random, dim=-1)])


def preflight(cfg: DictConfig, objective: Contrastive, data: DataModule, evaluation: Evaluation, output: Path) -> None:
    """Train three steps, evaluate once in every process, and print what the run will take."""
    losses, ends = [math.nan], list[float]()

    def record_step(trainer: pl.Trainer, *_: Any) -> None:
        losses.append(float(trainer.callback_metrics["train/loss"]))  # waits for the device
        ends.append(time.perf_counter())

    quick = {"max_steps": STEPS, "max_epochs": -1, "max_time": None,
             "limit_val_batches": 0, "enable_checkpointing": False, "logger": False,
             "enable_progress_bar": False, "enable_model_summary": False, "accumulate_grad_batches": 1,
             "callbacks": [LambdaCallback(on_train_batch_end=record_step)], "default_root_dir": str(output),
             **launch.strategy_options(cfg)}  # fmt: skip
    trainer: pl.Trainer = build(cfg.trainer, **quick)
    trainer.fit(objective, datamodule=data)
    require(math.isfinite(losses[-1]), f"check: the loss is {losses[-1]} after {len(ends)} steps.")
    seconds = (ends[-1] - ends[0]) / max(1, len(ends) - 1) * cfg.trainer.accumulate_grad_batches
    sampled = SampledEncoder(refresh_encoder(trainer, objective))
    steps = total_steps(cfg, data, seconds)
    often = (validations(cfg, steps, data, seconds) + bool(cfg.trainer.num_sanity_val_steps), 2 if cfg.measure_before else 1)
    items = 0
    for evaluator, times in zip((evaluation.validation, evaluation.test), often, strict=True):
        sampled.items = set()
        if evaluator is not None:
            run_evaluator(evaluator, objective, sampled)
        items += times * len(sampled.items)
    each = sampled.seconds / max(1, len(sampled.encode.cache))
    training, evaluating = steps * seconds, each * items
    parameters = sum(p.numel() for p in objective.parameters())
    trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    lines = {
        "data": "a stream" if data.dataset is None else f"{len(data.dataset):,} rows of {len(data.columns)} columns",
        "model": f"{parameters / 1e6:.1f} M parameters, {trained / 1e6:.1f} M of them trained",
        "training": f"{steps} steps of {data.batch_size}, {seconds:.2f} s each: {format_duration(training)}; "
        f"the loss after {len(ends)} is {losses[-1]:.4f}",
        "measuring": f"{items:,} texts or images, {1000 * each:.1f} ms each: {format_duration(evaluating)}, scoring aside",
        "memory": f"{peak_memory_gb():.1f} GB so far, on {trainer.strategy.root_device}, {trainer.world_size} processes",
        "writes": f"{output}: model/ {4 * parameters / 1e6:.0f} MB, checkpoints/ of {12 * trained / 1e6:.0f} MB, "
        f"{cfg.keep_last} last and {1 if cfg.monitor else 0} best",
        "in all": f"about {format_duration(training + evaluating)}",
    }  # fmt: skip
    print_status("\ncheck passed; nothing is kept\n" + "\n".join(f"  {name:10} {text}" for name, text in lines.items()))
    if trainer.is_global_zero:
        with suppress(OSError):  # it holds other files
            output.rmdir()


def total_steps(cfg: DictConfig, data: DataModule, seconds: float) -> int:
    """The number of steps of the whole run, of ``seconds`` each: what is first of steps, epochs and time ends it."""
    given, epochs, limits = cfg.trainer.max_steps, cfg.trainer.max_epochs, list[float]()
    if given not in (None, -1):
        limits.append(given)
    if data.sampler is not None and epochs not in (None, -1):
        limits.append(len(data.sampler) // cfg.trainer.accumulate_grad_batches * epochs)  # type: ignore[arg-type]
    if (left := Timer(cfg.trainer.max_time).time_remaining()) is not None:
        limits.append(max(1, left // max(seconds, 1e-9)))
    advice = "Set trainer.max_steps, trainer.max_epochs, or trainer.max_time to train for a given time"
    require(limits, f"trainer.max_steps={given}: the run would not end. {advice}.")
    return int(min(limits))


def validations(cfg: DictConfig, steps: int, data: DataModule, seconds: float) -> int:
    """The number of validations of the whole run, whose steps take ``seconds``."""
    every = cfg.trainer.val_check_interval
    if isinstance(every, int):
        return steps // every
    if isinstance(every, str) and (time := Timer(every).time_remaining()):
        return int(steps * seconds // time)
    epoch = steps if data.sampler is None else len(data.sampler)  # type: ignore[arg-type]
    return max(1, round(steps / max(1.0, epoch * (every or 1.0))))


def format_duration(seconds: float) -> str:
    """Seconds as text: ``40 s``, ``12 min``, ``2.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
