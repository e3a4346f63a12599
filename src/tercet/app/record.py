"""The record of a run: config.yaml, revision.txt and metrics.json in its folder, and the same in every logger."""

import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger

from tercet import __version__
from tercet.distributed.gather import rank
from tercet.messages import describe_logger, log_errors

ARTIFACTS = ("record", "model", "checkpoints")
RECORD = (".yaml", ".txt", ".json", ".html", ".csv", ".png", ".md", ".patch")
KEYS_WITHOUT_EFFECT = (  # keys, or their beginnings, that change no result
    "output_dir", "name", "resume", "check", "num_threads", "logger", "keep_last", "save_every", "measure_before",
    "optimized_metric", "artifacts", "callback.progress", "callback.summary", "callback.embeddings", "callback.figures",
)  # fmt: skip
PACKAGES = ("torch", "pytorch-lightning", "transformers", "datasets", "hydra-core", "torchmetrics", "wandb")


def write_start(cfg: DictConfig, output: Path, data: Any, loggers: Sequence[Logger]) -> dict[str, Any]:
    """Write the configuration and the versions of code and data, also to the loggers; uncommitted code is changes.patch."""
    data_notes = {"name": data.name, "fingerprint": data.fingerprint()}
    notes = {"revision": revision(), "data": data_notes, "versions": versions()}
    config = _plain(cfg)
    config |= notes | {"data": config["data"] | data_notes}
    if is_main_process():
        (output / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True), encoding="utf-8")
        (output / "revision.txt").write_text(_text(notes), encoding="utf-8")
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


def _plain(cfg: DictConfig) -> dict[str, Any]:
    values = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def close_loggers(loggers: Sequence[Logger], status: str) -> None:
    """Finalize the loggers with a status, ``finished`` or ``failed``, and end the W&B run: the next job needs its own."""
    for logger in loggers:
        logger.finalize(status)
        if isinstance(logger, WandbLogger) and is_main_process():
            with log_errors(describe_logger(logger), Exception):
                logger.experiment.finish(exit_code=0 if status == "finished" else 1)


def log_artifacts(
    loggers: Sequence[Logger], output: Path, cfg: DictConfig, metrics: dict[str, float], notes: dict[str, Any]
) -> None:
    """Log the metrics as W&B's summary, and up to ``cfg.artifacts`` the artifacts record, model and checkpoints."""
    kind = cfg.artifacts
    metadata = {"revision": notes["revision"], "data": notes["data"]["fingerprint"], **metrics}
    for logger in loggers:
        if not isinstance(logger, WandbLogger):
            continue
        with log_errors(describe_logger(logger), Exception):
            logger.experiment.summary.update(metrics)
            for what in ARTIFACTS[: 1 + ARTIFACTS.index(kind)] if kind else ():
                logger.experiment.log_artifact(_artifact(output, cfg.name, what, metadata))


def _artifact(output: Path, name: str, what: str, metadata: dict[str, Any]) -> Any:
    import wandb

    named = re.sub(r"[^\w.-]", "_", f"{name}-{output.name}-{what}", flags=re.ASCII)[-128:]
    made = wandb.Artifact(named, type=what, metadata=metadata)
    if what != "record" and (output / what).is_dir():
        made.add_dir(str(output / what), policy="immutable")  # not copied to W&B's cache
    for file in sorted(p for p in output.iterdir() if what == "record" and p.suffix in RECORD):
        made.add_file(str(file))
    return made


def versions() -> dict[str, str]:
    """The versions of the packages that a result depends on."""
    found = {"python": platform.python_version(), "tercet": __version__}
    installed = {d.name.lower(): d.version for d in importlib.metadata.distributions()}
    return found | {package: installed[package] for package in PACKAGES if package in installed}


def revision() -> str:
    """The commit of the code, marked where files differ from it; the version where there is no repository."""
    described = _git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    return described.strip() if described else f"no repository, tercet {__version__}"


def _git(*arguments: str) -> str:
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True, errors="replace")
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout


def _text(notes: dict[str, Any]) -> str:
    lines = [f"code {notes['revision']}", f"data {notes['data']['name']} {notes['data']['fingerprint']}"]
    return "\n".join([*lines, *(f"{name} {version}" for name, version in notes["versions"].items())]) + "\n"


def write_metrics(output: Path, values: dict[str, float], name: str = "metrics.json") -> None:
    """Write the metrics to a file that is replaced as a whole: a reader never sees half of it."""
    path = output / name
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(dict(sorted(values.items())), indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def first_difference(run: Path, cfg: DictConfig, counts: Callable[[str], bool]) -> str | None:
    """The first setting, of those that ``counts`` accepts, in which ``cfg`` differs from a run's: ``a=1, not 2``."""
    before, now = (dict(_flat(_plain(c))) for c in (OmegaConf.load(run / "config.yaml"), cfg))  # type: ignore[arg-type]
    other = [key for key in {**before, **now} if counts(key) and before.get(key) != now.get(key)]
    key = min(other, key=lambda name: name.count("."), default=None)  # the one that others interpolate
    return key and f"{key}={before.get(key)}, not {now.get(key)}"


def _flat(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def read_metrics(run: Path) -> dict[str, float]:
    """The metrics that a run has written."""
    values: dict[str, float] = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    return values


def stage_metrics(values: dict[str, float], name: str) -> dict[str, float]:
    """The metrics of one stage, without its name."""
    return {key.removeprefix(f"{name}/"): value for key, value in values.items() if key.startswith(f"{name}/")}
