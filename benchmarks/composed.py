"""Our side of a benchmark: a run as the command line composes it."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytorch_lightning as pl
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from benchmarks.turns import Tick
from tercet.app.cli import config_folder
from tercet.app.components import build
from tercet.messages import silence_libraries

EACH_STEP = ("rng_state", "graceful_stop", "skip_non_finite", "throughput", "collapse")
COLUMNS = ("text", "paraphrase", "contradiction")


def configuration(overrides: Sequence[str]) -> DictConfig:
    """What ``train.py`` would run with them."""
    OmegaConf.register_new_resolver("run_id", lambda: "benchmark", replace=True)
    with initialize_config_dir(config_folder(), version_base="1.3"):
        cfg = compose("train", list(overrides))
    OmegaConf.register_new_resolver("hydra", lambda key: "benchmark", replace=True)
    return cfg


def file_of(columns: Sequence[Sequence[str]]) -> str:
    """A table of texts in a temporary file; one column, or more that belong together."""
    path = Path(tempfile.mkdtemp()) / "texts.parquet"
    names = COLUMNS[: len(columns)]
    pq.write_table(pa.table(dict(zip(names, map(list, columns), strict=True))), path)
    return str(path)


class _Ticking(pl.Callback):
    def __init__(self, tick: Tick) -> None:
        self.tick = tick

    def on_train_batch_end(self, *_: Any) -> None:
        self.tick()


def fit(tick: Tick, overrides: Sequence[str], columns: Sequence[Sequence[str]]) -> None:
    """Train with the callbacks of ``train.py`` that a step pays for; nothing is written."""
    silence_libraries()
    names = ",".join(COLUMNS[: len(columns)])
    path = file_of(columns)
    cfg = configuration([
        *overrides, "data=table", f"data.path={path}", f"data.columns=[{names}]", "data.held_out=0",
        "trainer.max_epochs=-1", "trainer.max_steps=1000000", "trainer.devices=1",
        "trainer.enable_checkpointing=false", "trainer.enable_progress_bar=false", "logger=none",
        "trainer.enable_model_summary=false",
    ])  # fmt: skip
    pl.seed_everything(cfg.seed, verbose=False)
    callbacks = [*(build(cfg.callback[name]) for name in EACH_STEP), _Ticking(tick)]
    trainer: pl.Trainer = build(cfg.trainer, logger=False, callbacks=callbacks)
    trainer.fit(build(cfg.objective), datamodule=build(cfg.data.module))
