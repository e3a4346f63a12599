"""Finished runs, as they lie on disk."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from tercet import record
from tercet.console import say
from tercet.error import InputError

IDLE = (  # keys, or how they begin, that change no result
    "output_dir", "name", "resume", "check", "threads", "logger", "keep", "save_every", "measure_before", "optimized_metric",
    "artifacts", "callback.progress", "callback.summary", "callback.embeddings", "callback.figures",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, its ``metrics``, and what its command ``set``."""

    folder: Path
    seed: int
    metrics: dict[str, float]
    set: dict[str, str]
    command: str
    optimized: str | None


def read(paths: Sequence[Path]) -> list[Run]:
    """All finished runs at or below ``paths``; runs that have written no metrics are counted."""
    for path in paths:
        if not path.is_dir():
            raise InputError(f"runs={path}: there is no such folder. Give run folders, or one that holds them.")
    folders = {file.parent for path in paths for file in path.rglob("config.yaml")}
    whole = [folder for folder in folders if not folders & set(folder.parents)]  # a run's stages are parts of it
    runs = [_run(folder) for folder in sorted(whole, key=_natural) if (folder / "metrics.json").is_file()]
    if unfinished := len(whole) - len(runs):
        say(f"{unfinished} runs have not finished and are left out.")
    if not runs:
        raise InputError(f"runs={', '.join(map(str, paths))}: no finished run (config.yaml and metrics.json) is there.")
    return runs


def _natural(folder: Path) -> list[Any]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in folder.parts]


def _run(folder: Path) -> Run:
    cfg = OmegaConf.load(folder / "config.yaml")
    assert isinstance(cfg, DictConfig)
    typed = list(cfg.get("command") or [])
    given, command = [part.partition("=") for part in typed], shlex.join(["python", "train.py", *typed])
    return Run(
        folder, int(cfg.seed), record.read(folder), {k: v for k, _, v in given}, command, cfg.get("optimized_metric")
    )
