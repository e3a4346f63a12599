"""Loggers that end no run: what they cannot write, or send, is said once."""

import csv
import errno
import logging
import netrc
import os
import secrets
import shutil
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytorch_lightning.loggers as loggers
from pytorch_lightning.utilities import rank_zero_only

from tercet.messages import describe_logger, log_errors, print_status, warn_once

CALLS = ("log_metrics", "log_hyperparams", "log_table", "log_image", "save", "finalize")
STEP = "trainer/global_step"  # Lightning's
STAGED = "staged"  # in the run's folder: what W&B copies for `wandb sync`
FREE = 64 * 1024  # bytes; with less a disk is full


def fault_tolerant(logger: loggers.Logger) -> loggers.Logger:
    """The same logger; what goes wrong in it is said once, and the run goes on."""
    wandb = isinstance(logger, loggers.WandbLogger)
    for name in CALLS:
        if call := getattr(logger, name, None):
            setattr(logger, name, _guarded(call, logger, Exception if wandb else OSError, wandb))
    return logger


def _guarded(call: Callable[..., Any], logger: loggers.Logger, kind: type[Exception], wandb: bool) -> Callable[..., Any]:
    @wraps(call)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        with log_errors(describe_logger(logger), kind):
            # W&B writes by a process of its own, which keeps a full disk to itself.
            if wandb:
                _room(str(logger.save_dir))
            return call(*args, **kwargs)

    return guarded


def _room(folder: str) -> None:
    if shutil.disk_usage(folder).free < FREE:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), folder)


def wandb_logger(
    project: str, name: str, group: str | None, tags: list[str], mode: str, save_dir: str, resume: bool
) -> loggers.WandbLogger | None:
    """Weights & Biases; ``mode`` is ``offline`` or ``online``. With ``resume`` the run in ``save_dir`` goes on.

    Online without an account, or where nothing answers, goes offline and says so: a login is never asked for in the middle
    of a job. Where nothing can be written there is none. Under W&B's agent project and id are the agent's.
    """
    if int(os.environ.get("RANK", 0)):
        return loggers.WandbLogger(project=project, save_dir=save_dir)  # the first process has the run
    if mode == "online" and not has_account():
        print_status("W&B: no account on this machine (WANDB_API_KEY, or `wandb login`); the run is written offline.")
        mode = "offline"
    folder = Path(save_dir)
    _settle(folder)
    agent = os.environ.get("WANDB_SWEEP_ID")
    job = folder.name.isdigit()  # of a sweep by Hydra
    if sweep := agent or (job and folder.parent.name):
        group, tags = f"{group or name}/{sweep}", [*tags, sweep]
    begin = partial(
        _begin, name=f"{name}-{folder.name}" if job else name, group=group and group[:128],
        tags=list(dict.fromkeys(tag[:64] for tag in tags)), dir=save_dir, job_type="train",
    )  # fmt: skip
    try:
        kept = folder / "wandb" / "run-id.txt"
        kept.parent.mkdir(parents=True, exist_ok=True)
        _room(save_dir)
        identity = kept.read_text().strip() if resume and kept.is_file() else secrets.token_hex(4)
        own: dict[str, Any] = {} if agent else {"project": project, "id": identity}
        try:
            run = begin(mode=mode, **own)
        except Exception as error:  # whatever W&B, its service or the network says: no reason not to train
            if mode == "offline":
                raise
            print_status(f"W&B: {type(error).__name__}: {error}; the run is written offline. `wandb sync` sends it later.")
            own |= {} if agent else {"id": secrets.token_hex(4)}  # the id of the attempt is in use
            run = begin(mode="offline", **own)
        kept.write_text(f"{run.id}\n")
    except Exception as error:
        print_status(f"W&B: {type(error).__name__}: {error}; the run goes on without it.")
        return None
    return loggers.WandbLogger(project=project, save_dir=save_dir, experiment=run)


def _settle(folder: Path) -> None:
    """W&B's own settings, where the user has none; its copies stay with the run, not in the home."""
    logging.raiseExceptions = False  # its log is in the run's folder: a full disk would be told a hundred times
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_FINISH_TIMEOUT", "600")  # seconds that an outage may hold the end; else it is for ever
    os.environ.setdefault("WANDB_FINISH_TIMEOUT_RAISES", "true")
    if Path(os.environ.get("WANDB_DATA_DIR", STAGED)).name == STAGED:  # or that of the job before
        os.environ["WANDB_DATA_DIR"] = str(folder / "wandb" / STAGED)


def _begin(**settings: Any) -> Any:
    import wandb

    run = wandb.init(resume="allow", reinit="finish_previous", **settings)
    run.define_metric(STEP, hidden=True)
    run.define_metric("epoch", hidden=True)
    run.define_metric("*", step_metric=STEP, step_sync=True)
    return run


def has_account() -> bool:
    """Whether there is a key for W&B, in the environment or where `wandb login` writes it."""
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        written = netrc.netrc().authenticators(host)
    except (OSError, netrc.NetrcParseError):
        written = None
    return bool(os.environ.get("WANDB_API_KEY") or written)


class AtomicCSVLogger(loggers.CSVLogger):
    """Lightning's, but written beside and renamed. ``keep``: a run that goes on keeps the rows up to where it begins.

    Where the disk is full that is said, training goes on, and the rows are written once there is room.
    """

    def __init__(
        self, save_dir: str, name: str, version: str, prefix: str, flush_logs_every_n_steps: int, keep_earlier: bool
    ) -> None:
        super().__init__(save_dir, name, version, prefix, flush_logs_every_n_steps)
        self.earlier: list[dict[str, str]] = []
        file, self.aside = Path(self.log_dir, "metrics.csv"), Path(self.log_dir, ".metrics-before.csv")
        if keep_earlier and file.is_file():  # Lightning's writer begins with removing it
            self.aside.write_bytes(file.read_bytes())
        if keep_earlier and self.aside.is_file():
            with self.aside.open(newline="", encoding="utf-8") as there:
                self.earlier = list(csv.DictReader(there))

    @rank_zero_only
    def save(self) -> None:
        """The file is there whole, or as it was."""
        writer = self.experiment
        file, keys = Path(writer.metrics_file_path), list(writer.metrics_keys)
        partial = file.with_name(f".{file.name}")
        rows: list[dict[str, Any]] = list(writer.metrics)
        try:
            if self.earlier and rows:
                begin = min(int(row["step"]) for row in rows)
                kept = [row for row in self.earlier if int(row["step"]) < begin]
                writer.metrics = [*({k: v for k, v in row.items() if v} for row in kept), *rows]
            if file.is_file():
                partial.write_bytes(file.read_bytes())
            writer.metrics_file_path = str(partial)
            super().save()
            if partial.is_file():
                partial.replace(file)
            if rows:
                self.earlier = []
                self.aside.unlink(missing_ok=True)
        except OSError as error:
            writer.metrics, writer.metrics_keys = rows, keys
            partial.unlink(missing_ok=True)
            warn_once(f"{file} could not be written ({error}); training goes on, and it is tried again.")
        finally:
            writer.metrics_file_path = str(file)
