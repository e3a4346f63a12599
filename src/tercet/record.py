"""What a run leaves behind: config.yaml, revision.txt, metrics.json, and the same in every logger."""

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.loggers import Logger, TensorBoardLogger

from tercet.distributed import rank

ARTIFACTS = ("record", "model", "checkpoints")
PACKAGES = ("tercet", "torch", "pytorch-lightning", "transformers", "datasets", "hydra-core", "torchmetrics", "wandb")


def start(cfg: DictConfig, output: Path, data: Any, loggers: Sequence[Logger]) -> dict[str, Any]:
    """Write the configuration and the state of code and data; tell the loggers."""
    notes = {
        "revision": revision(),
        "data": {"name": data.name, "fingerprint": data.fingerprint()},
        "versions": versions(),
    }
    config = {**_plain(cfg), **notes}
    if first():
        (output / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True), encoding="utf-8")
        (output / "revision.txt").write_text(_text(notes), encoding="utf-8")
    for logger in loggers:
        logger.log_hyperparams(config)
        if isinstance(logger, TensorBoardLogger):  # its hyper-parameters stay in a file beside the events
            logger.experiment.add_text("config", f"```yaml\n{OmegaConf.to_yaml(config)}```")
    return notes


def first() -> bool:
    """Whether this is the process that writes."""
    return rank() == 0 and int(os.environ.get("RANK", 0)) == 0


def _plain(cfg: DictConfig) -> dict[str, Any]:
    values = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def close(loggers: Sequence[Logger], status: str) -> None:
    """``finished`` or ``failed``. W&B keeps one run open per process; the next job of a sweep needs its own."""
    for logger in loggers:
        logger.finalize(status)
        if type(logger).__name__ == "WandbLogger" and rank() == 0:
            logger.experiment.finish(exit_code=0 if status == "finished" else 1)  # type: ignore[attr-defined]


def artifacts(loggers: Sequence[Logger], output: Path, name: str, kind: str | None) -> None:
    """Hand W&B the run's files: what it was and said, and with it the ``model``, or that and the ``checkpoints``."""
    for logger in loggers:
        if kind is None or type(logger).__name__ != "WandbLogger":
            continue
        import wandb

        made = wandb.Artifact(f"{name}-{output.name}", type="run")
        for file in sorted(
            p for p in output.iterdir() if p.suffix in (".yaml", ".txt", ".json", ".html", ".csv", ".png")
        ):
            made.add_file(str(file))
        for folder in ARTIFACTS[1 : 1 + ARTIFACTS.index(kind)]:
            if (output / folder).is_dir():
                made.add_dir(str(output / folder), name=folder)
        logger.experiment.log_artifact(made)  # type: ignore[attr-defined]


def versions() -> dict[str, str]:
    """The versions that decide a result."""
    found = {"python": platform.python_version()}
    installed = {d.name.lower(): d.version for d in importlib.metadata.distributions()}
    return found | {package: installed[package] for package in PACKAGES if package in installed}


def revision() -> str:
    """The commit of the code, marked where files differ from it; the version where there is no repository."""
    here = Path(__file__).resolve().parent
    try:
        said = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=here, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return f"no repository, tercet {importlib.metadata.version('tercet')}"
    return said.stdout.strip()


def _text(notes: dict[str, Any]) -> str:
    lines = [f"code {notes['revision']}", f"data {notes['data']['name']} {notes['data']['fingerprint']}"]
    return "\n".join([*lines, *(f"{name} {version}" for name, version in notes["versions"].items())]) + "\n"


def metrics(output: Path, values: dict[str, float], name: str = "metrics.json") -> None:
    """Write the metrics, all or none: a reader never sees half a file."""
    path = output / name
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(dict(sorted(values.items())), indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def changed(run: Path, cfg: DictConfig, counts: Callable[[str], bool]) -> str | None:
    """The first of the settings that ``counts`` in which ``cfg`` differs from what the run was made with, told to a user."""
    before, now = (dict(_flat(_plain(c))) for c in (OmegaConf.load(run / "config.yaml"), cfg))  # type: ignore[arg-type]
    other = [key for key in {**before, **now} if counts(key) and before.get(key) != now.get(key)]
    key = min(other, key=lambda name: name.count("."), default=None)  # the one that others are taken from
    return key and f"{key}={before.get(key)}, not {now.get(key)}"


def _flat(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def read(run: Path) -> dict[str, float]:
    """The metrics that a run has written."""
    values: dict[str, float] = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    return values


def stage(values: dict[str, float], name: str) -> dict[str, float]:
    """The metrics of one stage, without its name."""
    return {key.removeprefix(f"{name}/"): value for key, value in values.items() if key.startswith(f"{name}/")}
