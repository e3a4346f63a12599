"""The record of a run: config.yaml, revision.txt and metrics.json in its folder, and the same in every logger."""

import importlib.metadata
import json
import os
import platform
import re
import secrets
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger

from tercet import __version__
from tercet.app.components import walk
from tercet.app.run_files import Metrics
from tercet.distributed.gather import rank
from tercet.messages import describe_logger, log_errors
from tercet.models.folder import TOKENIZER_FILES
from tercet.paths import write_text

ARTIFACTS = ("record", "model", "checkpoints")
# The files of a run that the artifact "record" has, beside its figures and tables: no other file of the folder is sent.
RECORD = ("config.yaml", "revision.txt", "metrics.json", "metrics.csv", "report.html", "changes.patch")
MODEL_FILE = re.compile(
    r"([fg]/)?(\d+_\w+/)?((model|head)[\w-]*\.safetensors(\.index\.json)?|\w+\.model|chat_template\.jinja|README\.md|"
    r"(config|tercet|modules|config_sentence_transformers|sentence_bert_config|preprocessor_config|generation_config)\.json|"
    + "|".join(map(re.escape, sorted(TOKENIZER_FILES))) + ")"
)  # fmt: skip
CHECKPOINT = re.compile(r"[^/]+\.ckpt|random-\d+\.pt")
CODE = ("src", "conf", "train.py", "pyproject.toml", "constraints.txt")  # what changes.patch is about
PATCH_SIZE = 1 << 20  # characters of changes.patch, at most
SECRET = re.compile(  # a line of changes.patch that is left out
    r"(?i)(api_?key|secret|passwd|password|credential|private_?key|(access|auth|bearer|api)[-_ ]?token)[\w\"']*\s*[:=]"
    r"|-----BEGIN|://[^/\s:@]+:[^/\s@]+@|^[-+ ][A-Za-z0-9+/=]{48,}$|\b[0-9a-f]{40,}\b"
    r"|\b(hf_|gh[a-z]_|github_pat_|glpat-|sk-|xox[a-z]-|AKIA|ASIA|AIza|ya29\.)[A-Za-z0-9_.-]{12,}"
)
KEYS_WITHOUT_EFFECT = (  # keys, or their beginnings, that change no result
    "output_dir", "name", "resume", "check", "num_threads", "logger", "keep_last", "save_every", "measure_before",
    "optimized_metric", "artifacts", "card", "code_changes", "allow_changed_data", "callback.progress", "callback.summary",
    "callback.embeddings",
    "callback.figures",
)  # fmt: skip
PACKAGES = ("torch", "pytorch-lightning", "transformers", "datasets", "hydra-core", "torchmetrics", "wandb")


def write_start(cfg: DictConfig, output: Path, data: Any, loggers: Sequence[Logger]) -> dict[str, Any]:
    """Write the configuration and the versions of code and data, also to the loggers.

    With ``cfg.code_changes`` changes.patch has what of Tercet's own checkout is not committed. ``run`` in the configuration,
    and in the notes that are returned, is new: results carry it, too (see ``is_finished``).
    """
    data_notes = {"name": data.name, "fingerprint": data.fingerprint()}
    notes: dict[str, Any] = {"revision": revision(), "data": data_notes, "versions": versions()}
    values: Any = OmegaConf.to_container(cfg, resolve=True)
    config = values | notes | {"data": values["data"] | data_notes}
    if is_main_process():
        notes["run"] = write_settings(output, cfg)
        lines = (("code", notes["revision"]), ("data", " ".join(data_notes.values())), *notes["versions"].items())
        write_text(output / "revision.txt", "".join(f"{name} {value}\n" for name, value in lines))
        (output / "changes.patch").unlink(missing_ok=True)
        if cfg.code_changes and (changes := code_changes()):
            write_text(output / "changes.patch", changes)
    for logger in loggers:
        logger.log_hyperparams(config)
        if isinstance(logger, TensorBoardLogger):  # which writes hyperparameters to a file beside the events only
            logger.experiment.add_text("config", f"```yaml\n{OmegaConf.to_yaml(config)}```")
    return notes


def is_main_process() -> bool:
    """Whether this is the process that writes files."""
    launched = os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0))  # before the processes are joined
    return rank() == 0 and int(launched) == 0


def close_loggers(loggers: Sequence[Logger], status: str) -> None:
    """Finalize the loggers with a status, ``finished`` or ``failed``, and end the W&B run: the next job needs its own."""
    for logger in loggers:
        logger.finalize(status)
        if isinstance(logger, WandbLogger) and is_main_process():
            with log_errors(describe_logger(logger), Exception):
                logger.experiment.finish(exit_code=0 if status == "finished" else 1)


def log_artifacts(
    loggers: Sequence[Logger], output: Path, cfg: DictConfig, metrics: Metrics, notes: dict[str, Any], shown: Sequence[Path]
) -> None:
    """Log the metrics as W&B's summary, and up to ``cfg.artifacts`` the artifacts record, model and checkpoints.

    ``shown`` are the run's figures and tables, which are part of its record.
    """
    kinds = ARTIFACTS[: 1 + ARTIFACTS.index(cfg.artifacts)] if cfg.artifacts else ()
    metadata = {"revision": notes["revision"], "data": notes["data"]["fingerprint"], **metrics}
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            with log_errors(describe_logger(logger), Exception):
                logger.experiment.summary.update(metrics)
                for kind in kinds:
                    files = [*(output / name for name in RECORD), *shown] if kind == "record" else written_files(output, kind)
                    logger.experiment.log_artifact(_artifact(output, cfg.name, kind, metadata, files))


def written_files(output: Path, kind: str) -> list[Path]:
    """The files of the model or of the checkpoints of a run, by their names, and not what else may be in these folders."""
    folder, known = output / kind, MODEL_FILE if kind == "model" else CHECKPOINT
    files = (path for path in folder.rglob("*") if not path.is_symlink())
    return [path for path in files if known.fullmatch(path.relative_to(folder).as_posix())]


def _artifact(output: Path, name: str, kind: str, metadata: dict[str, Any], files: Sequence[Path]) -> Any:
    import wandb

    full_name = re.sub(r"[^\w.-]", "_", f"{name}-{output.name}-{kind}", flags=re.ASCII)[-128:]
    artifact = wandb.Artifact(full_name, type=kind, metadata=metadata)
    folder = output if kind == "record" else output / kind
    options: Any = {} if kind == "record" else {"policy": "immutable"}  # not copied to W&B's cache
    for file in sorted(path for path in files if path.is_file()):
        artifact.add_file(str(file), file.relative_to(folder).as_posix(), **options)
    return artifact


def versions() -> dict[str, str]:
    """The versions of the packages that a result depends on."""
    described = (distribution.metadata for distribution in importlib.metadata.distributions())  # each access parses its file
    installed = {metadata["Name"].lower(): metadata["Version"] for metadata in described if metadata["Name"]}
    found = {package: installed[package] for package in PACKAGES if package in installed}
    return {"python": platform.python_version(), "tercet": __version__, **found}


def revision() -> str:
    """The commit of Tercet's own checkout, marked where files differ from it; the version where Tercet is installed."""
    if checkout() is None:
        return f"tercet {__version__}, installed, not of a repository of its own"
    described = _git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*").strip()
    return f"{described} of tercet's repository"


def code_changes() -> str:
    """The difference of Tercet's own checkout to its commit, without lines that look like a secret; cut at ``PATCH_SIZE``."""
    lines = _git("diff", "--no-ext-diff", "--no-textconv", "HEAD", "--", *CODE).splitlines() if checkout() else []
    kept = "\n".join(f"{line[:1]}(left out: it looks like a secret)" if SECRET.search(line) else line for line in lines)
    return (f"{kept[:PATCH_SIZE]}\n(cut here)" if len(kept) > PATCH_SIZE else kept) + "\n" * bool(kept)


def checkout() -> Path | None:
    """The folder of Tercet's own repository; None where this package is part of none, or of that of another project."""
    package = Path(__file__).resolve().parents[1]
    top = _git("rev-parse", "--show-toplevel", folder=package).strip()
    tracked = top and Path(top).resolve() == package.parents[1] and _git("ls-files", "__init__.py", folder=package)
    project = package.parents[1] / "pyproject.toml"
    is_own = tracked and project.is_file() and '\nname = "tercet"\n' in project.read_text(encoding="utf-8", errors="replace")
    return package.parents[1] if is_own else None


def _git(*arguments: str, folder: Path | None = None) -> str:
    command = ["git", "-C", str(folder or Path(__file__).resolve().parents[3]), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, errors="replace").stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def write_settings(output: Path, cfg: DictConfig) -> str:
    """Write ``config.yaml`` with a new identity ``run``, which is returned: the results of this process carry it."""
    run = secrets.token_hex(8)
    write_text(output / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True) + f"run: {run}\n")
    return run


def write_metrics(output: Path, values: Metrics, name: str = "metrics.json", run: str | None = None) -> None:
    """Write the metrics, and the identity of the ``run`` that they are of."""
    write_text(output / name, json.dumps({**values, **({"run": run} if run else {})}, indent=2, sort_keys=True) + "\n")


def first_difference(settings: Mapping[str, Any], cfg: DictConfig, counts: Callable[[str], bool]) -> str | None:
    """The first setting, of those that ``counts`` accepts, that ``cfg`` changes in a run's ``settings``: ``a=1, not 2``."""
    plain = settings, OmegaConf.to_container(cfg, resolve=True)
    before, now = ({key: value for key, value in walk(node) if not isinstance(value, dict)} for node in plain)
    other = [key for key in {**before, **now} if counts(key) and before.get(key) != now.get(key)]
    if "data.fingerprint" not in before:  # written by a version that did not record it
        other = [key for key in other if key != "data.fingerprint"]
    key = min(other, key=lambda name: name.count("."), default=None)  # the one that others interpolate
    return key and f"{key}={before.get(key)}, not {now.get(key)}"


def stage_metrics(values: Metrics, name: str) -> Metrics:
    """The metrics of one stage, without its name."""
    return {key.removeprefix(f"{name}/"): value for key, value in values.items() if key.startswith(f"{name}/")}
