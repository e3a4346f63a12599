"""The command ``train``: build and check the components, evaluate, train, evaluate again, record."""

import os
import shlex
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Checkpoint, LearningRateMonitor, ModelCheckpoint, ModelSummary, ProgressBar

from tercet.app import launch, record, report, run_files, run_folder, signals
from tercet.app.commands.evaluate import initialize_from
from tercet.app.commands.preflight import preflight
from tercet.app.components import build, check_settings, check_values, find_targets, start_record
from tercet.app.config_checks import check_config, check_model, set_derived
from tercet.app.examples import EXAMPLES, write_examples
from tercet.app.folder_checks import check_folders
from tercet.app.model_card import CARD, check_given, make_card
from tercet.app.own_texts import choose_by_columns, fit_batch_size, set_run_length
from tercet.distributed.sharding import gather_weights, load_state
from tercet.errors import require
from tercet.messages import print_status, silence_libraries, warn_once
from tercet.models.engine.chunking import trim_heap
from tercet.models.folder import newest_checkpoint, read_checkpoint, save_model
from tercet.paths import check_writable, locate, write_text
from tercet.training.callbacks.checkpoints import AtomicCheckpointIO, Settings, generations
from tercet.training.callbacks.evaluation import START, Evaluation, evaluate_stage, validate
from tercet.training.callbacks.figures import shown_files
from tercet.training.contrastive import Contrastive
from tercet.training.datamodule import DataModule
from tercet.training.lightning_compat import FSDP2
from tercet.training.loggers import fault_tolerant

RESULT_GROUPS = ("seed", "data", "sampler", "model", "loss", "view", "objective", "optimizer", "scheduler", "init_from")
RESULT_KEYS = (
    "monitor", "callback.hard_labels", "trainer.precision", "trainer.accumulate_grad_batches", "trainer.gradient_clip",
    "trainer.limit_train_batches", "trainer.overfit_batches",
)  # fmt: skip
SAME_ROWS = ("path", "cache", "workers", "name")  # of data: ``data.fingerprint`` says what the rows are
CHECKPOINT_PARTS = {"callbacks", "DataModule", "epoch", "global_step", "loops", "lr_schedulers", "optimizer_states",
                    "pytorch-lightning_version", "state_dict"}  # fmt: skip
# A finished run is not repeated where only these differ.
FREE_KEYS = ("card", "resume", "output_dir", "command", "check", "code_changes", "run", "allow_changed_data")


def run(cfg: DictConfig, output: Path) -> float | None:
    """Train in this process, or in as many as the trainer asks for; returns the optimized metric."""
    config, data = prepare(choose_by_columns(cfg), output)
    alone = not launch.started_by_launcher()
    with nullcontext() if config.check else run_folder.locked(output):
        if alone:
            data.load_rows()  # errors in the data are found, and tokens cached, before any process is started
        fit_batch_size(config, data)
        if alone:
            data.prepare_data()
        set_run_length(config, data)
        if config.resume and is_done(config, output):
            print_status(f"{output} is finished; there is nothing left to do.")
            return optimized_value(config, run_files.read_metrics(output))
        if not check_resume(config, output) and not config.check:
            begin_anew(config, output)
        signals.describe_stop(lambda: _kept(output))
        if alone and launch.needs_processes(config):
            return launch.launch_processes(worker, config, output)
        return train(config, output, data)


def prepare(cfg: DictConfig, output: Path) -> tuple[DictConfig, DataModule]:
    """Resolve the configuration and build its data; run every check that needs no data."""
    start_record(cfg)
    check_settings(cfg)
    config: Any = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    check_writable(output, "output_dir")
    if config.resume:
        run_folder.check_no_runs_inside("output_dir", output, "resume=true: there is no run to go on with: ")
    silence_libraries()
    drop_missing_validation(config)
    set_derived(config)
    check_values(config, cfg)
    check_given(config.card)
    config.output_dir = str(output)
    data = build(config.data.module)
    build(config.validation)  # an error in it ends the run here
    check_config(config, get_class(config.objective._target_), data)
    check_folders(config)
    config.data.fingerprint = data.fingerprint()  # for the record: a run is resumed with the same rows
    return config, data


def drop_missing_validation(config: DictConfig) -> None:
    """Validate nothing where an experiment does so on rows that the data, chosen beside it, does not hold out."""
    sources = [node["source"] for _, node in find_targets(OmegaConf.to_container(config.validation)) if "source" in node]
    empty = [s for s in sources if s is None or (s.get("split") == "validation" and not s.get("validation_rows"))]
    if empty and not config.monitor:
        why = f"data={config.data.name} holds out no rows for validation: no metric chooses settings"
        own = "data.validation_rows=500 holds some out, a fifth at most" if "validation_rows" in config.data else ""
        reads_images = "ImageTransform" in str(OmegaConf.select(config, "data.transform._target_"))
        other = "" if reads_images else "evaluation@validation=stsb_dev would be one that needs no such rows"
        warn_once(". ".join(filter(None, [why, own, other])) + ".")
        config.validation = {"_target_": "tercet.evaluation.EvaluatorGroup", "members": {}}
        if str(config.optimized_metric).startswith("val/"):
            config.optimized_metric = None


def worker(config: dict[str, Any], output: str) -> float | None:
    """Run one of several processes: ``config`` and ``output`` are plain, so that they can be sent to it."""
    silence_libraries()
    cfg = OmegaConf.create(config)
    return train(cfg, Path(output), build(cfg.data.module))


def train(cfg: DictConfig, output: Path, data: DataModule) -> float | None:
    """Train in this process, one of those of the run; returns the optimized metric."""
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    if cfg.num_threads:
        torch.set_num_threads(cfg.num_threads)
    objective: Contrastive = build(cfg.objective)
    if cfg.init_from:
        print_status(initialize_from(objective.encoder, cfg.init_from))
    check_model(objective, data, launch.started_by_launcher(), cfg.trainer.strategy == FSDP2)
    evaluation = Evaluation(build(cfg.validation), build(cfg.test), count_validation_rows(cfg))
    if cfg.check:
        preflight(cfg, objective, data, evaluation, output)
        return None
    loggers = [fault_tolerant(made) for logger in cfg.logger.values() if logger and (made := build(logger))]
    switched_on = [made for node in cfg.callback.values() if node and is_enabled(cfg, made := build(node), bool(loggers))]
    callbacks = [evaluation, Settings(plain_settings(cfg)), *switched_on]
    plugins = [*(build(cfg.trainer.plugins) or []), AtomicCheckpointIO(cfg.keep_last)]
    options = {"logger": loggers, "callbacks": callbacks, "plugins": plugins, **launch.strategy_options(cfg)}
    trainer: pl.Trainer = build(cfg.trainer, default_root_dir=str(output), **options)
    if int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0))) == 0:  # the first process on its node
        data.prepare_data()
    try:
        notes = record.write_start(cfg, output, data, loggers)
        metrics = evaluate_stage(trainer, objective, "before") if cfg.measure_before else {}
        by_validation = str(cfg.optimized_metric).startswith("val/") and cfg.optimized_metric != cfg.monitor
        by_test = str(cfg.optimized_metric).startswith("test/")
        if cfg.measure_before and (by_test or by_validation):  # fails now rather than after training
            starts = {name.replace("before/", "test/", 1): value for name, value in metrics.items()}
            optimized_value(cfg, starts | (validate(trainer, objective) if by_validation else {}))
        # Training must not depend on the random numbers that the evaluation drew.
        # Processes get different seeds: rows of two of them must not share their dropout.
        pl.seed_everything(cfg.seed + trainer.global_rank, workers=True, verbose=False)
        if resumed := newest_checkpoint(last_checkpoints(output)) if cfg.resume else None:
            print_status(f"resuming from {resumed}, step {read_checkpoint(resumed, mmap=True)['global_step']}")
        trainer.fit(objective, datamodule=data, ckpt_path=str(resumed) if resumed else None)
        metrics |= restore_best(trainer, objective, evaluation)
        metrics |= validate(trainer, objective) if by_validation else {}
        metrics |= evaluate_stage(trainer, objective, "test")
        write_examples(output / EXAMPLES, evaluation.test, objective.cached_encoder)
        write_results(cfg, trainer, objective, metrics, notes, output)
        trainer.strategy.barrier("written")  # the next stage reads what the first process wrote
        record.close_loggers(loggers, "finished")
    except BaseException:
        record.close_loggers(loggers, "failed")
        raise
    finally:
        trim_heap(now=True)  # the next job of a sweep is in this process too
    return optimized_value(cfg, metrics)


def _kept(output: Path) -> str:
    """What a stopped run has kept, by its files, and how to go on."""
    newest = newest_checkpoint(last_checkpoints(output))
    if newest is None:
        return " before a checkpoint was written; there is nothing to keep"
    folder = output.relative_to(Path.cwd()) if output.is_relative_to(Path.cwd()) else output
    go_on = f"The same command with output_dir={shlex.quote(str(folder))} resume=true continues"
    return f" at step {read_checkpoint(newest, mmap=True)['global_step']}; {folder} holds it. {go_on}."


def is_done(cfg: DictConfig, output: Path) -> bool:
    """Whether the folder has the results of these settings."""
    if not run_files.is_finished(output):
        return False
    return not record.first_difference(run_files.read_settings(output), cfg, lambda key: key.split(".")[0] not in FREE_KEYS)


def count_validation_rows(cfg: DictConfig) -> int | None:
    """The number of rows that the data holds out for validation; None where it holds out none."""
    rows = cfg.data.get("validation_rows")  # data with splits of its own has no such key
    return len(build(cfg.data.validation).rows()) if rows and cfg.data.validation else None


def check_resume(cfg: DictConfig, output: Path) -> bool:
    """Whether the run goes on from a checkpoint there; ``InputError`` where that would mix two settings.

    The number of steps may differ. A checkpoint's settings are those inside it: ``config.yaml`` may be of a later start.
    """
    there = last_checkpoints(output) if cfg.resume else []
    if not there:
        return False
    written = run_files.read_settings(output) if (output / "config.yaml").is_file() else {}
    old = f"resume=true: {output} is a run of Tercet 0.1, whose settings had other names, and cannot be resumed. "
    new = f"init_from={output} starts from its weights; use another output_dir."
    require("batches" not in written, old + new)  # a key of version 0.1
    newest = newest_checkpoint(there)
    checkpoint = read_checkpoint(newest, mmap=True) if newest else {}
    lacking = ", ".join(sorted(CHECKPOINT_PARTS - checkpoint.keys()))
    weights = f"init_from={newest} starts from its weights; use another output_dir"
    require(not lacking, f"resume=true: {newest} lacks {lacking}, which a run needs to go on. {weights}.")
    settings = Settings.read(checkpoint) or written
    allowed = ("data.fingerprint",) if cfg.allow_changed_data else ()
    other = record.first_difference(settings, cfg, lambda key: changes_results(key) and key not in allowed)
    advice = "Set it as it was"
    if other and other.startswith("data.fingerprint="):
        advice = "The data, or how it is read, has changed: restore it, set allow_changed_data=true to go on with it"
    require(not other, f"resume=true: {output} was started with {other}. {advice}, or use another output_dir.")
    return True


def begin_anew(cfg: DictConfig, output: Path) -> None:
    """Set aside another run that the folder holds: results, checkpoints and settings of two runs do not mix."""
    if cfg.resume:
        print_status(f"resume=true: {output} holds no checkpoint; training starts anew.")
    if record.is_main_process() and run_folder.holds_run(output) and not (cfg.resume and _is_same_start(cfg, output)):
        start = cfg.init_from and locate(str(cfg.init_from)).resolve()
        inside = f"init_from={cfg.init_from} is in output_dir={output}, which is set aside. Use another output_dir."
        require(not start or not start.is_relative_to(output.resolve()), inside)
        run_folder.set_aside(output)


def _is_same_start(cfg: DictConfig, output: Path) -> bool:
    """Whether the folder has nothing but the beginning of a run with these settings, stopped before its first checkpoint."""
    if (output / "metrics.json").is_file() or not (output / "config.yaml").is_file():
        return False
    return not record.first_difference(run_files.read_settings(output), cfg, changes_results)


def last_checkpoints(output: Path) -> list[Path]:
    """The last checkpoints of a run, as many as there are."""
    return [path for path in generations(output / "checkpoints", 100) if path.is_file()]


def plain_settings(cfg: DictConfig) -> dict[str, Any]:
    """The settings as plain values, for a checkpoint."""
    return cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))


def changes_results(key: str) -> bool:
    """Whether a run learns something else with another value of this setting."""
    group, last = key.split(".")[0], key.split(".")[-1]
    if group == "data" and last in SAME_ROWS:
        return False
    return group in RESULT_GROUPS or key.startswith(RESULT_KEYS)


def is_enabled(cfg: DictConfig, callback: pl.Callback, has_logger: bool) -> bool:
    """Whether a callback has what it works with, and the trainer's switch for its kind is on (Lightning refuses both)."""
    kinds = {ProgressBar: "enable_progress_bar", Checkpoint: "enable_checkpointing", ModelSummary: "enable_model_summary"}
    if isinstance(callback, ModelCheckpoint) and callback.filename == "best" and not cfg.monitor:
        return False
    if isinstance(callback, LearningRateMonitor) and not has_logger:
        return False
    return all(cfg.trainer[key] for kind, key in kinds.items() if isinstance(callback, kind))


def restore_best(trainer: pl.Trainer, objective: Contrastive, evaluation: Evaluation) -> dict[str, float]:
    """Load the best checkpoint where a metric selects one, or the weights before training where it does not beat them.

    Returns training's metrics and the kept weights' validation.
    """
    best: Any = trainer.checkpoint_callback
    values = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(("train/", "val/"))}
    monitor = getattr(best, "monitor", None)
    if monitor and best.best_model_score is None:
        print_status(f"No validation ran, these are the last weights: {monitor} selected none. See trainer.val_check_interval.")
    elif monitor and best.best_model_path:
        path, score = Path(best.best_model_path), float(best.best_model_score)
        if not path.is_file():
            print_status(f"{path}, the best by {monitor}, is not there: these are the last weights.")
            return values
        inside = read_checkpoint(path, mmap=True)["callbacks"].get(best.state_key, {})
        written = float(inside.get("best_model_score", score))
        if written != score:
            print_status(f"The checkpoint of {monitor} {score:.4f} could not be written; the best one is that before it.")
            score = written
        print_status(f"best {monitor}: {score:.4f}")
        if evaluation.start is not None and evaluation.keeps_start(score, best.mode) and path.with_name(START).is_file():
            before = f"{evaluation.start:.4f} before training, standard error {evaluation.standard_error(best.mode):.4f}"
            print_status(f"Nothing beat the start ({before}): the model is the one that training started from.")
            path, score = path.with_name(START), evaluation.start
        load_state(objective, read_checkpoint(path)["state_dict"])
        values = {name: x for name, x in values.items() if name.startswith("train/")} | {monitor: score}
    return values


def write_results(
    cfg: DictConfig, trainer: pl.Trainer, objective: Contrastive, metrics: dict[str, float], notes: dict[str, Any], output: Path
) -> None:
    """Write the model, the metrics and the report, and print the table."""
    encoder = gather_weights(objective.encoder)
    if not trainer.is_global_zero:
        return
    save_model(encoder, output / "model", cfg.save_dtype)
    facts = {**notes, "steps": trainer.global_step}
    write_text(output / "model" / CARD, make_card(encoder, output / "model", plain_settings(cfg), metrics, facts))
    record.write_metrics(output, metrics, run=notes["run"])
    before, after = (record.stage_metrics(metrics, stage) for stage in ("before", "test"))
    shown = shown_files(output)
    report.write_report(output, cfg, metrics, shown)
    record.log_artifacts(trainer.loggers, output, cfg, metrics, notes, shown)
    headline = report.run_result(cfg, metrics, before, after).headline
    print_status(f"\n{headline}\n\n{report.before_after_table(before, after)}")
    print_status(f"\n{trainer.global_step} steps, data {notes['data']['fingerprint']}. Written to {output}:")
    for path in sorted(p for p in output.iterdir() if p.name != "hparams.yaml" and p.name[0] != "."):
        print_status(f"  {path.name}{'/' if path.is_dir() else ''}")


def optimized_value(cfg: DictConfig, metrics: dict[str, float]) -> float | None:
    """The value of the metric that a sweep optimizes, or None."""
    name, known = cfg.optimized_metric, ", ".join(sorted(metrics))
    require(not name or name in metrics, f"optimized_metric={name} was not measured. There are: {known}.")
    return metrics[name] if name else None
