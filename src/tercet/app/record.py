"""The record of a run: config.yaml, revision.txt and metrics.json in its folder, and the same in every logger."""

import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger

from tercet import __version__
from tercet.app.components import walk
from tercet.distributed.gather import rank
from tercet.evaluation.direction import SMALLER_IS_BETTER
from tercet.messages import describe_logger, log_errors

EXAMPLES = "examples.npz"  # test metrics by example: names as in metrics.json without their stage
ARTIFACTS = ("record", "model", "checkpoints")
RECORD = (".yaml", ".txt", ".json", ".html", ".csv", ".png", ".md", ".patch")
KEYS_WITHOUT_EFFECT = (  # keys, or their beginnings, that change no result
    "output_dir", "name", "resume", "check", "num_threads", "logger", "keep_last", "save_every", "measure_before",
    "optimized_metric", "artifacts", "allow_changed_data", "callback.progress", "callback.summary", "callback.embeddings",
    "callback.figures",
)  # fmt: skip
PACKAGES = ("torch", "pytorch-lightning", "transformers", "datasets", "hydra-core", "torchmetrics", "wandb")

Metrics = dict[str, float]


def write_start(cfg: DictConfig, output: Path, data: Any, loggers: Sequence[Logger]) -> dict[str, Any]:
    """Write the configuration and the versions of code and data, also to the loggers; uncommitted code is changes.patch."""
    data_notes = {"name": data.name, "fingerprint": data.fingerprint()}
    notes: dict[str, Any] = {"revision": revision(), "data": data_notes, "versions": versions()}
    values: Any = OmegaConf.to_container(cfg, resolve=True)
    config = values | notes | {"data": values["data"] | data_notes}
    if is_main_process():
        (output / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True), encoding="utf-8")
        lines = (("code", notes["revision"]), ("data", " ".join(data_notes.values())), *notes["versions"].items())
        (output / "revision.txt").write_text("".join(f"{name} {value}\n" for name, value in lines), encoding="utf-8")
        (output / "changes.patch").unlink(missing_ok=True)
        if changes := _git("diff", "HEAD"):
            (output / "changes.patch").write_text(changes, encoding="utf-8")
    for logger in loggers:
        logger.log_hyperparams(config)
        if isinstance(logger, TensorBoardLogger):  # which writes hyperparameters to a file beside the events only
            logger.experiment.add_text("config", f"```yaml\n{OmegaConf.to_yaml(config)}```")
    return notes


def is_main_process() -> bool:
    """Whether this is the process that writes files."""
    return rank() == 0 and int(os.environ.get("RANK", 0)) == 0


def close_loggers(loggers: Sequence[Logger], status: str) -> None:
    """Finalize the loggers with a status, ``finished`` or ``failed``, and end the W&B run: the next job needs its own."""
    for logger in loggers:
        logger.finalize(status)
        if isinstance(logger, WandbLogger) and is_main_process():
            with log_errors(describe_logger(logger), Exception):
                logger.experiment.finish(exit_code=0 if status == "finished" else 1)


def log_artifacts(loggers: Sequence[Logger], output: Path, cfg: DictConfig, metrics: Metrics, notes: dict[str, Any]) -> None:
    """Log the metrics as W&B's summary, and up to ``cfg.artifacts`` the artifacts record, model and checkpoints."""
    kinds = ARTIFACTS[: 1 + ARTIFACTS.index(cfg.artifacts)] if cfg.artifacts else ()
    metadata = {"revision": notes["revision"], "data": notes["data"]["fingerprint"], **metrics}
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            with log_errors(describe_logger(logger), Exception):
                logger.experiment.summary.update(metrics)
                for kind in kinds:
                    logger.experiment.log_artifact(_artifact(output, cfg.name, kind, metadata))


def _artifact(output: Path, name: str, kind: str, metadata: dict[str, Any]) -> Any:
    import wandb

    full_name = re.sub(r"[^\w.-]", "_", f"{name}-{output.name}-{kind}", flags=re.ASCII)[-128:]
    artifact = wandb.Artifact(full_name, type=kind, metadata=metadata)
    if kind == "record":
        for file in sorted(path for path in output.iterdir() if path.suffix in RECORD):
            artifact.add_file(str(file))
    elif (output / kind).is_dir():
        artifact.add_dir(str(output / kind), policy="immutable")  # not copied to W&B's cache
    return artifact


def versions() -> dict[str, str]:
    """The versions of the packages that a result depends on."""
    installed = {d.name.lower(): d.version for d in importlib.metadata.distributions()}
    found = {package: installed[package] for package in PACKAGES if package in installed}
    return {"python": platform.python_version(), "tercet": __version__, **found}


def revision() -> str:
    """The commit of the code, marked where files differ from it; the version where there is no repository."""
    described = _git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*").strip()
    return described or f"no repository, tercet {__version__}"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).resolve().parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, errors="replace").stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def write_metrics(output: Path, values: Metrics, name: str = "metrics.json") -> None:
    """Write the metrics to a file that is replaced as a whole: a reader never sees half of it."""
    partial = output / f".{name}.{os.getpid()}"
    partial.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    partial.replace(output / name)


def write_examples(output: Path, evaluator: Any, encode: Any) -> None:
    """Write the test's metrics by example, where the evaluator has some; ``compare`` asks what other examples would change."""
    examples = evaluator.examples(encode) if hasattr(evaluator, "examples") else {}
    values: Any = {name: np.asarray(x, np.float32) for name, x in examples.items()}
    if values and is_main_process():
        np.savez_compressed(output / EXAMPLES, **values)


def first_difference(run: Path, cfg: DictConfig, counts: Callable[[str], bool]) -> str | None:
    """The first setting, of those that ``counts`` accepts, in which ``cfg`` differs from a run's: ``a=1, not 2``."""
    plain = (OmegaConf.to_container(config, resolve=True) for config in (OmegaConf.load(run / "config.yaml"), cfg))
    before, now = ({key: value for key, value in walk(node) if not isinstance(value, dict)} for node in plain)
    other = [key for key in {**before, **now} if counts(key) and before.get(key) != now.get(key)]
    if "data.fingerprint" not in before:  # written by a version that did not record it
        other = [key for key in other if key != "data.fingerprint"]
    key = min(other, key=lambda name: name.count("."), default=None)  # the one that others interpolate
    return key and f"{key}={before.get(key)}, not {now.get(key)}"


def read_metrics(run: Path) -> Metrics:
    """The metrics that a run has written."""
    return dict(json.loads((run / "metrics.json").read_text(encoding="utf-8")))


def smaller_is_better(cfg: DictConfig) -> frozenset[str]:
    """The names, without stage, suite and task, of a run's metrics that are better when smaller."""
    return frozenset(cfg.get("smaller_is_better") or SMALLER_IS_BETTER)


def stage_metrics(values: Metrics, name: str) -> Metrics:
    """The metrics of one stage, without its name."""
    return {key.removeprefix(f"{name}/"): value for key, value in values.items() if key.startswith(f"{name}/")}
