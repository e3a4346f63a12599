"""The job of ``train.py``: build, check, measure, train, measure again, write down."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Checkpoint, LearningRateMonitor, ModelCheckpoint, ModelSummary, ProgressBar
from pytorch_lightning.loggers import Logger

from tercet import launch, record, report
from tercet.build import build
from tercet.callback.checkpoints import Durable, newest
from tercet.check import check, check_model
from tercet.console import before_after, quiet, say
from tercet.data import DataModule, evaluators
from tercet.error import InputError
from tercet.logger import lasting
from tercet.model.checkpoint import read
from tercet.model.folder import save
from tercet.model.heap import tidy
from tercet.objective import sharded
from tercet.objective.contrastive import Contrastive
from tercet.open_model import take_over
from tercet.paths import writable
from tercet.preflight import preflight
from tercet.requeue import requeued
from tercet.values import check_values

LEARNED = ("seed", "data", "batches", "model", "loss", "view", "objective", "optimizer", "schedule", "start_from")


def run(cfg: DictConfig, output: Path) -> float | None:
    """Train in this process, or in as many as the trainer asks for; returns the optimized metric."""
    config, data = ready(cfg, output)
    if cfg.resume and (metrics := finished(config, output)):
        say(f"{output} is finished; there is nothing left to do.")
        return optimized(config, metrics)
    goes_on(config, output)
    with requeued():
        if not launch.launched():
            data.prepare_data()  # mistakes in the data are found, and tokens cached, before any process is started
            if launch.processes(config) > 1:
                return launch.launch(worker, config, output)
        return train(config, output, data)


def ready(cfg: DictConfig, output: Path) -> tuple[DictConfig, DataModule]:
    """The resolved configuration and its data, after all that can be checked without reading the data."""
    config = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    assert isinstance(config, DictConfig)
    writable(output, "output_dir")
    quiet()
    check_values(config, cfg)
    config.output_dir = str(output)
    data = build(config.data.module)
    check(config, get_class(config.objective._target_), data)
    return config, data


def worker(config: dict[str, Any], output: str) -> float | None:
    """What each of several processes runs."""
    quiet()
    cfg = OmegaConf.create(config)
    return train(cfg, Path(output), build(cfg.data.module))


def train(cfg: DictConfig, output: Path, data: DataModule) -> float | None:
    """One process's part of the run."""
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    objective: Contrastive = build(cfg.objective)
    if cfg.start_from:
        say(take_over(objective.encoder, cfg.start_from))
    if plan := objective.encoder.plan():
        say(plan)
    check_model(objective, data, launch.launched())
    tests = evaluators(test := [build(cfg.test)])
    if cfg.check:
        preflight(cfg, objective, data, test, output)
        return None
    loggers = [lasting(made) for logger in cfg.logger.values() if logger and (made := build(logger))]
    callbacks = [
        made for callback in cfg.callback.values() if callback for made in wanted(cfg, build(callback), loggers)
    ]
    plugins = [*(build(cfg.trainer.plugins) or []), Durable(cfg.keep)]
    trainer: pl.Trainer = build(
        cfg.trainer, logger=loggers, callbacks=callbacks, plugins=plugins, default_root_dir=str(output)
    )
    if launch.first_here():
        data.prepare_data()
    try:
        notes = record.start(cfg, output, data, loggers)
        metrics = measure(trainer, objective, tests, "before") if cfg.measure_before else {}
        if metrics and str(cfg.optimized_metric).startswith("test/"):  # better said now than after training
            optimized(cfg, {name.replace("before/", "test/", 1): value for name, value in metrics.items()})
        # The draws of the evaluation must not decide what training draws.
        # Processes draw differently: rows of two of them must not share their dropout.
        pl.seed_everything(cfg.seed + trainer.global_rank, workers=True, verbose=False)
        trainer.fit(objective, datamodule=data, ckpt_path=interrupted(cfg, output))
        metrics |= numbers(trainer, "train/") | select(trainer, objective)
        metrics |= measure(trainer, objective, tests, "test")
        finish(cfg, trainer, objective, metrics, notes, output)
        trainer.strategy.barrier("written")  # the next stage reads what the first process wrote
        record.close(loggers, "finished")
    except BaseException:
        record.close(loggers, "failed")
        raise
    finally:
        tidy(now=True)  # the next job of a sweep is in this process too
    return optimized(cfg, metrics)


def finished(cfg: DictConfig, output: Path) -> dict[str, float] | None:
    """The metrics of a run that has been made to its end with these very settings."""
    if not (output / "metrics.json").is_file():
        return None
    if record.changed(output, cfg, lambda key: key.split(".")[0] not in ("resume", "output_dir", "command", "check")):
        return None
    return record.read(output)


def goes_on(cfg: DictConfig, output: Path) -> None:
    """Raise ``InputError`` where ``resume`` would mix two settings: the steps to make may differ, what is learned not."""
    there = any((output / "checkpoints").glob("last*.ckpt"))
    if there and not cfg.resume:
        say(f"{output} holds a run, which is written over; resume=true would have gone on with it.")
    if cfg.resume and not there:
        say(f"resume=true: {output} holds no checkpoint; this is the start.")
    if not cfg.resume or not there:
        return
    if other := record.changed(output, cfg, lambda key: key.split(".")[0] in LEARNED):
        raise InputError(f"resume=true: {output} was begun with {other}. Set it as it was, or use another output_dir.")


def interrupted(cfg: DictConfig, output: Path) -> str | None:
    """The checkpoint that a run with ``resume`` goes on from, if there is one."""
    path = newest(output / "checkpoints", read) if cfg.resume else None
    if path is None:
        return None
    say(f"going on from {path}, step {read(path)['global_step']}")
    return str(path)


def wanted(cfg: DictConfig, callback: pl.Callback, loggers: list[Logger]) -> list[pl.Callback]:
    """The callback, unless the trainer's switch for its kind is off: Lightning takes both at once for a mistake."""
    kinds = {
        ProgressBar: "enable_progress_bar",
        Checkpoint: "enable_checkpointing",
        ModelSummary: "enable_model_summary",
    }
    if isinstance(callback, ModelCheckpoint) and callback.filename == "best" and not cfg.monitor:
        return []  # nothing selects
    if isinstance(callback, LearningRateMonitor) and not loggers:
        return []
    return [callback] if all(cfg.trainer[key] for kind, key in kinds.items() if isinstance(callback, kind)) else []


def measure(trainer: pl.Trainer, objective: Contrastive, tests: Any, stage: str) -> dict[str, float]:
    """Run the test evaluator under the name of a stage."""
    objective.stage = stage
    trainer.test(objective, tests, verbose=False)
    return numbers(trainer, f"{stage}/")


def numbers(trainer: pl.Trainer, *prefixes: str) -> dict[str, float]:
    """The trainer's last values of the metrics whose names start so."""
    seen = trainer.callback_metrics.items()
    return {name: float(value) for name, value in seen if name.startswith(prefixes)}


def select(trainer: pl.Trainer, objective: Contrastive) -> dict[str, float]:
    """Go back to the best checkpoint where a metric selects one; what validation says of the weights that are kept."""
    best = trainer.checkpoint_callback
    path, monitor = getattr(best, "best_model_path", ""), getattr(best, "monitor", None)
    if monitor and getattr(best, "best_model_score", None) is None:
        say(
            f"No validation ran: {monitor} selected nothing, these are the last weights. See trainer.val_check_interval."
        )
    elif path and monitor:
        sharded.load(objective, read(path)["state_dict"])
        score = float(best.best_model_score)  # type: ignore[union-attr]
        say(f"best {monitor}: {score:.4f}")
        return {monitor: score}
    return numbers(trainer, "val/")


def finish(
    cfg: DictConfig,
    trainer: pl.Trainer,
    objective: Contrastive,
    metrics: dict[str, float],
    notes: dict[str, Any],
    output: Path,
) -> None:
    """Write the model and the metrics; show the table."""
    encoder = sharded.whole(objective.encoder)
    if not trainer.is_global_zero:
        return
    save(encoder, output / "model")
    record.metrics(output, metrics)
    before, after = (record.stage(metrics, stage) for stage in ("before", "test"))
    report.write(output, cfg, metrics, before, after)
    record.hand_over(trainer.loggers, output, cfg, metrics, notes)
    say("\n" + before_after(before, after))
    say(f"\n{trainer.global_step} steps, data {notes['data']['fingerprint']}. Written to {output}:")
    for path in sorted(p for p in output.iterdir() if p.name != "hparams.yaml"):
        say(f"  {path.name}{'/' if path.is_dir() else ''}")


def optimized(cfg: DictConfig, metrics: dict[str, float]) -> float | None:
    """The value that a sweeper gets back."""
    if not cfg.optimized_metric:
        return None
    if cfg.optimized_metric not in metrics:
        raise InputError(
            f"optimized_metric={cfg.optimized_metric} was not measured. There are: {', '.join(sorted(metrics))}."
        )
    return metrics[cfg.optimized_metric]
