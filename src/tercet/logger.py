"""Loggers that need a decision before Lightning's own can be built."""

import os
from pathlib import Path

import pytorch_lightning.loggers as loggers

from tercet.console import say


def wandb(project: str, name: str, group: str | None, tags: list[str], mode: str, save_dir: str) -> loggers.WandbLogger:
    """Weights & Biases; ``mode`` is ``offline`` or ``online``.

    Online without an account goes offline and says so: a login is never asked for in the middle of a job.
    """
    if mode == "online" and not has_account():
        say("W&B: no account on this machine (WANDB_API_KEY, or `wandb login`); the run is written offline.")
        mode = "offline"
    os.environ.setdefault("WANDB_SILENT", "true")
    Path(save_dir).mkdir(parents=True, exist_ok=True)
    return loggers.WandbLogger(
        project=project, name=name, group=group, tags=tags, save_dir=save_dir, offline=mode == "offline"
    )


def has_account() -> bool:
    """Whether W&B would find a key."""
    import wandb as client

    return bool(os.environ.get("WANDB_API_KEY") or client.api.api_key)
