"""What one's own texts are trained with where the command does not say: objective, selection, number of steps."""

from typing import Any

from hydra import compose
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from tercet.app.components import build, check_values
from tercet.app.config_checks import set_derived
from tercet.app.hydra_compat import typed_overrides
from tercet.app.launch import num_processes
from tercet.errors import require
from tercet.messages import print_status
from tercet.training.datamodule import DataModule, RunLength
from tercet.types import Source


def choose_by_columns(cfg: DictConfig) -> DictConfig:
    """Compose again with the objective and the selection that fit the columns, as far as the command names none.

    Only where ``run_length`` is set and the data can be split for validation: other experiments say what they train.
    """
    if not (cfg.run_length and cfg.data.validation):
        return cfg
    resolved: Any = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    set_derived(resolved)
    check_values(resolved, cfg)
    command = typed_overrides()
    given = {override.lstrip("+~").split("=")[0] for override in command}
    source, chosen = build(cfg.data.train), list[str]()
    if "objective" not in given:
        chosen.append(f"objective={objective_for(source)}")
        cfg = _compose_again(cfg, command + chosen)
    if "selection" not in given:
        own = given & {"monitor", "evaluation@validation"}
        fitting = "none" if own else selection_for(get_class(cfg.objective._target_), len(source.columns))
        chosen.append(f"selection={fitting}")
        cfg = _compose_again(cfg, command + chosen)
    if chosen:
        print_status(f"{' '.join(chosen)}, by the text columns: {', '.join(source.columns)}")
    return cfg


def _compose_again(cfg: DictConfig, overrides: list[str]) -> DictConfig:
    again = compose("train", overrides)
    again.resume = cfg.resume  # set by the program where SLURM has queued the job again
    return again


def objective_for(source: Source) -> str:
    """The choice of conf/objective that learns from the columns of ``source``, and from its labels or positions."""
    provides: frozenset[str] = getattr(source, "provides", frozenset())
    if "position" in provides:
        return "quick_thoughts"
    if len(source.columns) > 1:
        return "simcse_sup"
    return "facenet" if "label" in provides else "simcse_unsup"


def selection_for(objective: Any, num_columns: int) -> str:
    """The choice of conf/selection that measures what ``objective``, a class, learns from ``num_columns`` columns."""
    positives = getattr(objective, "positives", "none")
    if positives == "label" and num_columns == 1:
        return "nearest_neighbor"
    return "retrieval" if positives in ("example", "label") else "none"


def fit_batch_size(config: DictConfig, data: DataModule) -> None:
    """Where ``run_length`` is set and there are fewer training rows than a batch has by default: one batch of all of them."""
    given = any(override.lstrip("+").startswith("data.batch_size=") for override in typed_overrides())
    rows = data.num_rows() if config.run_length and config.trainer.num_nodes == 1 and not given else None
    size = 0 if rows is None else rows // 2 * 2
    if rows is not None and rows < data.batch_size and size >= 2 * num_processes(config):
        config.data.batch_size = config.data.module.batch_size = data.batch_size = size
        print_status(f"data.batch_size={size}: there are {rows} training rows. More rows give more to contrast with.")


def set_run_length(config: DictConfig, data: DataModule) -> None:
    """Set the number of steps by ``run_length``, unless steps, epochs or a time are given, and how often validation runs."""
    if not config.run_length:
        return
    trainer, length = config.trainer, build(config.run_length)
    require(isinstance(length, RunLength), "run_length: a component is needed, with _target_: tercet.training.RunLength.")
    rows = data.num_rows()
    if trainer.max_steps == -1 and trainer.max_epochs == -1 and trainer.max_time is None:
        trainer.max_steps = length.steps(rows, data.batch_size)
        seen = trainer.max_steps * trainer.accumulate_grad_batches * data.batch_size
        passes = "" if rows is None else f", {seen / rows:.1f} passes over {rows:,} training rows"
        advice = "run_length sets that; trainer.max_steps, trainer.max_epochs or trainer.max_time another length."
        print_status(f"{trainer.max_steps} steps of {data.batch_size} rows{passes}: {advice}")
    if config.monitor and trainer.val_check_interval is None and trainer.max_steps > 0:
        trainer.val_check_interval = max(1, trainer.max_steps * trainer.accumulate_grad_batches // length.validations)
        trainer.check_val_every_n_epoch = None
