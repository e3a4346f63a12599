"""Loggers: Weights & Biases after a decision, and ``metrics.csv`` whole at any moment."""

import csv
import netrc
import os
import secrets
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytorch_lightning.loggers as loggers
from pytorch_lightning.utilities import rank_zero_only

from tercet.console import say
from tercet.notice import say_once


def wandb(
    project: str, name: str, group: str | None, tags: list[str], mode: str, save_dir: str, resume: bool
) -> loggers.WandbLogger:
    """Weights & Biases; ``mode`` is ``offline`` or ``online``. With ``resume`` the run in ``save_dir`` goes on.

    Online without an account goes offline and says so: a login is never asked for in the middle of a job.
    """
    if mode == "online" and not has_account():
        say("W&B: no account on this machine (WANDB_API_KEY, or `wandb login`); the run is written offline.")
        mode = "offline"
    os.environ.setdefault("WANDB_SILENT", "true")
    folder = Path(save_dir)
    if folder.name.isdigit():  # a job of a sweep
        group, tags = f"{group or name}/{folder.parent.name}", [*tags, folder.parent.name]
    kept = folder / "wandb" / "run-id.txt"
    identity = kept.read_text().strip() if resume and kept.is_file() else secrets.token_hex(4)
    if "WANDB_SWEEP_ID" in os.environ:  # W&B's agent has named the run
        identity = os.environ.get("WANDB_RUN_ID", identity)
    # By `mode`, not by Lightning's `offline`: that stays in the environment for the next job of a sweep.
    made = partial(
        loggers.WandbLogger, project=project, name=name, group=group, tags=tags, save_dir=save_dir, resume="allow"
    )
    logger = None
    if mode == "online":
        try:
            logger = made(mode=mode, id=identity)
            _ = logger.experiment  # it connects now
        except Exception as error:  # whatever W&B, its service or the network says: no reason not to train
            say(f"W&B: {type(error).__name__}: {error}; the run is written offline. `wandb sync` sends it later.")
            logger, identity = None, secrets.token_hex(4)  # the id of the attempt is in use
    if int(os.environ.get("RANK", 0)) == 0:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(identity + "\n")
    return logger or made(mode="offline", id=identity)


def has_account() -> bool:
    """Whether there is a key for W&B, in the environment or where `wandb login` writes it."""
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        written = netrc.netrc().authenticators(host)
    except (OSError, netrc.NetrcParseError):
        written = None
    return bool(os.environ.get("WANDB_API_KEY") or written)


class Curves(loggers.CSVLogger):
    """Lightning's, but written beside and renamed. ``keep``: a run that goes on keeps the rows up to where it begins.

    Where the disk is full that is said, training goes on, and the rows are written once there is room.
    """

    def __init__(
        self, save_dir: str, name: str, version: str, prefix: str, flush_logs_every_n_steps: int, keep: bool
    ) -> None:
        super().__init__(save_dir, name, version, prefix, flush_logs_every_n_steps)
        self.earlier: list[dict[str, str]] = []
        file, self.aside = Path(self.log_dir, "metrics.csv"), Path(self.log_dir, ".metrics-before.csv")
        if keep and file.is_file():  # Lightning's writer begins with removing it
            self.aside.write_bytes(file.read_bytes())
        if keep and self.aside.is_file():
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
            say_once(f"{file} could not be written ({error}); training goes on, and it is tried again.")
        finally:
            writer.metrics_file_path = str(file)
