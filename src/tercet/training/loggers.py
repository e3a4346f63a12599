"""Loggers that never end a run: what they cannot write or send causes one warning."""

import csv
import errno
import logging
import netrc
import os
import secrets
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytorch_lightning as pl
import pytorch_lightning.loggers as loggers
from pytorch_lightning.utilities import rank_zero_only

from tercet.images import make_thumbnail
from tercet.messages import describe_logger, log_errors, markdown_text, print_status, warn_once
from tercet.paths import atomic_write, write_text

LogFunctions = dict[type[loggers.Logger], Callable[..., None]]

GUARDED = ("log_metrics", "log_hyperparams", "log_table", "log_image", "save", "finalize")
STEP = "trainer/global_step"  # the name that Lightning gives to the step
STAGING = "staged"  # the folder of a run in which W&B puts copies for `wandb sync`
MIN_FREE_BYTES = 64 * 1024  # with less, a disk is considered full


def fault_tolerant(logger: loggers.Logger) -> loggers.Logger:
    """The same logger, whose errors (of W&B any, of others ``OSError``) cause one warning each and do not end the run."""
    wandb = isinstance(logger, loggers.WandbLogger)

    def guarded(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with log_errors(describe_logger(logger), Exception if wandb else OSError):
            if wandb:  # W&B writes in a process of its own, which does not report a full disk
                _check_disk(str(logger.save_dir))
            return call(*args, **kwargs)

    for name in GUARDED:
        if call := getattr(logger, name, None):
            setattr(logger, name, partial(guarded, call))
    return logger


def _check_disk(folder: str) -> None:
    if shutil.disk_usage(folder).free < MIN_FREE_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), folder)


def _wandb_table(logger: Any, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
    from wandb import Image

    data = [[Image(make_thumbnail(cell)) if isinstance(cell, bytes) else cell for cell in row] for row in rows]
    logger.log_table(key=f"tables/{name}", columns=list(columns), data=data, step=step)


def _tensorboard_table(logger: Any, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
    if not has_images(rows):
        lines = [" | ".join(markdown_text(str(cell)) for cell in row) for row in (columns, *rows)]
        lines.insert(1, " | ".join(["---"] * len(columns)))
        logger.experiment.add_text(f"tables/{name}", "\n".join(lines), step)


# How each kind of logger shows a figure (which is also in a file), a table, and embeddings; other loggers show none.
FIGURE: LogFunctions = {
    loggers.WandbLogger: lambda to, name, figure, path, step: to.log_image(key=f"figures/{name}", images=[path], step=step),
    loggers.TensorBoardLogger: lambda to, name, figure, path, step: to.experiment.add_figure(
        f"figures/{name}", figure, step, close=False
    ),
}
TABLE: LogFunctions = {loggers.WandbLogger: _wandb_table, loggers.TensorBoardLogger: _tensorboard_table}
EMBEDDINGS: LogFunctions = {
    loggers.TensorBoardLogger: lambda to, z, names, step: to.experiment.add_embedding(z, names, global_step=step)
}


def log_to_all(trainer: pl.Trainer, functions: LogFunctions, *content: Any) -> None:
    """Show ``content`` in each of the trainer's loggers for which there is a function."""
    for logger in trainer.loggers:
        for log in (function for kind, function in functions.items() if isinstance(logger, kind)):
            with log_errors(describe_logger(logger)):
                log(logger, *content, trainer.global_step)


def has_images(rows: Sequence[Sequence[Any]]) -> bool:
    """Whether a table has a cell of bytes, the content of an image file."""
    return any(isinstance(cell, bytes) for row in rows for cell in row)


def wandb_logger(
    project: str = "tercet", name: str = "run", group: str | None = None, tags: Sequence[str] = (), mode: str = "offline",
    save_dir: str = ".", resume: bool = False,
) -> loggers.WandbLogger | None:  # fmt: skip
    """A logger to Weights & Biases; ``mode`` is ``offline`` or ``online``. With ``resume`` the run in ``save_dir`` continues.

    Without an account or a connection the run is written offline, with a message: no login is requested in the middle of a job.
    ``WANDB_MODE`` in the environment may be offline or disabled, too, and is obeyed; it never sends what ``mode`` keeps here.
    Returns None where nothing can be written. Under a W&B agent, project and id are the agent's.
    """
    wish = os.environ.get("WANDB_MODE", "")
    if wish == "disabled":
        return None
    mode = "offline" if wish in ("offline", "dryrun") else mode
    if int(os.environ.get("RANK", 0)):
        return loggers.WandbLogger(project=project, save_dir=save_dir)  # the first process has the run
    if mode == "online" and not has_account():
        print_status("W&B: no account on this machine (WANDB_API_KEY, or `wandb login`); the run is written offline.")
        mode = "offline"
    folder = Path(save_dir)
    _set_environment(folder)
    agent = os.environ.get("WANDB_SWEEP_ID")
    job = folder.name.isdigit()  # of a sweep by Hydra
    sweep = agent or (folder.parent.name if job else "")
    run_group = f"{group or name}/{sweep}" if sweep else group
    settings: dict[str, Any] = {
        "name": f"{name}-{folder.name}" if job else name, "group": run_group and run_group[:128], "dir": save_dir,
        "tags": list(dict.fromkeys(tag[:64] for tag in [*tags, sweep] if tag)), "mode": mode, "job_type": "train",
    }  # fmt: skip
    try:
        id_file = folder / "wandb" / "run-id.txt"
        id_file.parent.mkdir(parents=True, exist_ok=True)
        _check_disk(save_dir)
        run_id = id_file.read_text().strip() if resume and id_file.is_file() else secrets.token_hex(4)
        run = _start_run(**settings, **({} if agent else {"project": project, "id": run_id}))
        write_text(id_file, f"{run.id}\n")
    except Exception as error:  # of W&B, its service, the network or the disk
        failure = f"W&B: {type(error).__name__}: {error}; the run"
        if mode == "online":
            print_status(f"{failure} is written offline. `wandb sync` sends it later.")
            return wandb_logger(project, name, group, tags, "offline", save_dir)  # with a new id: that of the attempt is in use
        print_status(f"{failure} goes on without it.")
        return None
    return loggers.WandbLogger(project=project, save_dir=save_dir, experiment=run)


def _set_environment(folder: Path) -> None:
    logging.raiseExceptions = False  # W&B's log is in the run's folder: a full disk would be reported a hundred times
    os.environ.setdefault("WANDB_SILENT", "true")
    # Else W&B online records the repository of the working directory, with the difference to its commit.
    os.environ.setdefault("WANDB_DISABLE_GIT", "true")
    os.environ.setdefault("WANDB_FINISH_TIMEOUT", "600")  # seconds that an outage may delay the end; no limit by default
    os.environ.setdefault("WANDB_FINISH_TIMEOUT_RAISES", "true")
    if Path(os.environ.get("WANDB_DATA_DIR", STAGING)).name == STAGING:  # or that of the previous job
        os.environ["WANDB_DATA_DIR"] = str(folder / "wandb" / STAGING)


def _start_run(**settings: Any) -> Any:
    import wandb

    run = wandb.init(resume="allow", reinit="finish_previous", **settings)
    run.define_metric(STEP, hidden=True)
    run.define_metric("epoch", hidden=True)
    run.define_metric("*", step_metric=STEP, step_sync=True)
    return run


def has_account() -> bool:
    """Whether there is a key for W&B, in the environment or where `wandb login` writes it."""
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    with suppress(OSError, netrc.NetrcParseError):
        return bool(os.environ.get("WANDB_API_KEY") or netrc.netrc().authenticators(host))
    return False


class AtomicCSVLogger(loggers.CSVLogger):
    """Lightning's CSV logger, but ``metrics.csv`` is written beside the old file and renamed, or later where the disk is full.

    With ``keep_earlier`` a resumed run keeps the rows before the step at which it continues.
    """

    def __init__(
        self, save_dir: str, name: str = "", version: str = "", prefix: str = "", flush_logs_every_n_steps: int = 50,
        keep_earlier: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(save_dir, name, version, prefix, flush_logs_every_n_steps)
        self.earlier: list[dict[str, str]] = []
        file, self.copy = Path(self.log_dir, "metrics.csv"), Path(self.log_dir, ".metrics-before.csv")
        if keep_earlier and file.is_file():  # Lightning's writer removes it
            with atomic_write(self.copy) as partial:
                shutil.copyfile(file, partial)
        if keep_earlier and self.copy.is_file():
            with self.copy.open(newline="", encoding="utf-8") as stream:
                self.earlier = list(csv.DictReader(stream))

    @rank_zero_only
    def save(self) -> None:
        """Write all rows, or leave the file as it was."""
        writer = self.experiment
        file, keys = Path(writer.metrics_file_path), list(writer.metrics_keys)
        rows: list[dict[str, Any]] = list(writer.metrics)
        if not rows:
            return
        try:
            if self.earlier:
                first = min(int(row["step"]) for row in rows)
                earlier = ({k: v for k, v in row.items() if v} for row in self.earlier if int(row["step"]) < first)
                writer.metrics = [*earlier, *rows]
            with atomic_write(file) as partial:
                if file.is_file():
                    shutil.copyfile(file, partial)
                else:  # to an existing file Lightning writes no header
                    partial.unlink()
                writer.metrics_file_path = str(partial)
                super().save()
            self.earlier = []
            self.copy.unlink(missing_ok=True)
        except OSError as error:
            writer.metrics, writer.metrics_keys = rows, keys
            warn_once(f"{file} could not be written ({error.strerror}); training goes on, and the next save tries again.")
        finally:
            writer.metrics_file_path = str(file)
