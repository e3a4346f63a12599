"""Loggers that need a decision before Lightning's own can be built."""

import netrc
import os
import secrets
from functools import partial
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
    folder = Path(save_dir)
    if folder.name.isdigit():  # a job of a sweep
        group, tags = f"{group or name}/{folder.parent.name}", [*tags, folder.parent.name]
    kept = folder / "wandb" / "run-id.txt"
    identity = kept.read_text().strip() if resume and kept.is_file() else secrets.token_hex(4)
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
