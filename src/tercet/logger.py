"""Loggers that need a decision before Lightning's own can be built."""

import netrc
import os
import secrets
from pathlib import Path
from urllib.parse import urlparse

import pytorch_lightning.loggers as loggers

from tercet.console import say


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
    Path(save_dir).mkdir(parents=True, exist_ok=True)
    kept = Path(save_dir) / "wandb" / "run-id.txt"
    identity = kept.read_text().strip() if resume and kept.is_file() else secrets.token_hex(4)
    kept.parent.mkdir(exist_ok=True)
    kept.write_text(identity + "\n")
    # By `mode`, not by Lightning's `offline`: that stays in the environment for the next job of a sweep.
    return loggers.WandbLogger(
        project=project, name=name, group=group, tags=tags, save_dir=save_dir, mode=mode, id=identity, resume="allow"
    )


def has_account() -> bool:
    """Whether there is a key for W&B, in the environment or where `wandb login` writes it."""
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        written = netrc.netrc().authenticators(host)
    except (OSError, netrc.NetrcParseError):
        written = None
    return bool(os.environ.get("WANDB_API_KEY") or written)
