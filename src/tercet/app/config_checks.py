"""What no part can see alone, checked before anything heavy starts."""

import os
import warnings
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from tercet.app.launch import num_processes, started_by_launcher
from tercet.app.record import ARTIFACTS
from tercet.errors import InputError
from tercet.models import ImageEncoder, TextEncoder
from tercet.models.text import max_row_length


def check_config(cfg: DictConfig, objective: Any, data: Any) -> None:
    """Raise ``InputError`` for combinations that cannot work; warn about those that mean something else than they seem."""
    _columns(cfg, objective, data)
    _views(cfg, objective)
    _labels(cfg, objective, data)
    _order(cfg, objective, data)
    _hard_negatives(cfg, objective, data)
    _devices(cfg)
    _batch(cfg)
    _monitor(cfg)
    _precision(cfg)
    if cfg.artifacts not in (*ARTIFACTS, None):
        raise InputError(f"artifacts={cfg.artifacts}: choose one of {', '.join(ARTIFACTS)}, or null.")


def _name(cfg: DictConfig) -> str:
    return str(cfg.objective._target_).rsplit(".", 1)[-1]


def _columns(cfg: DictConfig, objective: Any, data: Any) -> None:
    fewest, most = objective.columns
    if not fewest <= len(data.columns) <= most:
        wanted = str(fewest) if fewest == most else f"{fewest} to {most}"
        other = "objective=simcse_unsup" if len(data.columns) < fewest else "fewer data.columns"
        raise InputError(
            f"{_name(cfg)} needs {wanted} columns, but data={data.name} has {len(data.columns)} "
            f"({', '.join(data.columns)}). Name them with data.columns=[...], or use {other}."
        )


def _views(cfg: DictConfig, objective: Any) -> None:
    alike = not cfg.view.first and not cfg.view.second
    if not alike and not objective.dropout_views:
        raise InputError(
            f"{_name(cfg)} makes no views, but view changes texts by {_changes(cfg)}. "
            "Use view=dropout, or objective=simcse_unsup."
        )
    if objective.dropout_views and alike and OmegaConf.select(cfg, "model.backbone.dropout") == 0:
        raise InputError(
            f"{_name(cfg)} makes its two views by dropout, but model.backbone.dropout=0: they would be equal. "
            "Use model.backbone.dropout=0.1 or null, or another view, as view=token_cutoff."
        )


def _changes(cfg: DictConfig) -> str:
    return " and ".join(str(view._target_).rsplit(".", 1)[-1] for view in [*cfg.view.first, *cfg.view.second])


def _labels(cfg: DictConfig, objective: Any, data: Any) -> None:
    wants = objective.positives == "label" and len(data.columns) == 1
    by_label = str(cfg.sampler._target_).endswith("PKBatchSampler")
    if by_label and data.streaming:
        raise InputError("sampler=pk looks at all labels before it draws. Use data.streaming=false or sampler=random.")
    if wants and not by_label:
        raise InputError(
            f"{_name(cfg)} on one column needs rows of equal label in a batch, which sampler=random leaves to chance. "
            "Use sampler=pk."
        )
    if wants and "Triplet" not in str(cfg.loss._target_):
        raise InputError(f"{_name(cfg)} on one column needs loss=triplet; {cfg.loss._target_} needs two views.")


def _order(cfg: DictConfig, objective: Any, data: Any) -> None:
    in_order, context = (
        str(cfg.sampler._target_).endswith("WindowBatchSampler"),
        str(cfg.loss._target_).endswith("ContextLoss"),
    )
    if in_order and data.streaming:
        raise InputError("sampler=window reads documents in order. Use data.streaming=false.")
    if objective.positives == "position" and not in_order:
        raise InputError(f"{_name(cfg)} needs neighbouring sentences in a batch. Use sampler=window.")
    if (objective.positives == "position") != context:
        raise InputError(
            f"{_name(cfg)} with loss {cfg.loss._target_}: loss=context and objective=quick_thoughts need each other."
        )


def _hard_negatives(cfg: DictConfig, objective: Any, data: Any) -> None:
    weight = OmegaConf.select(cfg, "loss.hard_negative_weight") or 0
    if weight and (objective.dropout_views or len(data.columns) < 3):
        raise InputError(
            f"loss.hard_negative_weight={weight}, but there are no hard negatives: {_name(cfg)} on data={data.name} has "
            f"the columns {', '.join(data.columns)}. Use loss.hard_negative_weight=0, or data with a third column."
        )


def _shares(cfg: DictConfig) -> None:
    if cfg.trainer.strategy != "fsdp2":
        raise InputError(f"trainer.strategy={cfg.trainer.strategy}: choose fsdp2 (trainer=fsdp), or trainer=ddp.")
    unshared = {
        "objective.mlm.weight": "the language-model head shares the embeddings' weights",
        "loss.learn_temperature": "the temperature is no part of the encoder",
    }
    for key, why in unshared.items():
        if value := OmegaConf.select(cfg, key):
            raise InputError(
                f"{key}={str(value).lower()} with trainer.strategy=fsdp2: only the encoder is shared out, and {why}. "
                "Use trainer=ddp."
            )
    if OmegaConf.select(cfg, "model.execution.chunk_tokens") == "auto":
        raise InputError("model.execution.chunk_tokens=auto with trainer.strategy=fsdp2: give a number, as 16384.")


def _devices(cfg: DictConfig) -> None:
    if "fsdp" in str(cfg.trainer.strategy):
        _shares(cfg)
    there = torch.cuda.device_count()
    if cfg.trainer.accelerator in ("gpu", "cuda") and not there and not torch.backends.mps.is_available():
        raise InputError(
            f"trainer.accelerator={cfg.trainer.accelerator}, but torch sees no GPU here. Use trainer=cpu, or trainer=ddp_cpu "
            "for two processes (and trainer.precision=32-true)."
        )
    if cfg.trainer.num_nodes > 1:
        return
    several = num_processes(cfg)
    if (started := started_by_launcher()) and int(os.environ.get("WORLD_SIZE", several)) != several:
        raise InputError(
            f"{os.environ['WORLD_SIZE']} processes were started, but trainer.strategy={cfg.trainer.strategy} "
            f"trainer.devices={cfg.trainer.devices} uses {several}. Use trainer=ddp or ddp_cpu with as many trainer.devices."
        )
    if not started and several == 1 and _many(cfg.trainer.devices):
        raise InputError(f"trainer.devices={cfg.trainer.devices} needs a strategy: trainer=ddp, or trainer=ddp_cpu.")
    if cfg.trainer.accelerator in ("gpu", "cuda", "auto") and there and several > there:
        raise InputError(f"trainer.devices={cfg.trainer.devices}, but this machine has {there}. Use trainer.devices={there}.")


def _many(devices: Any) -> bool:
    if OmegaConf.is_list(devices):
        return len(devices) > 1
    return int(devices) > 1 if str(devices).isdigit() else torch.cuda.device_count() > 1


def check_model(objective: Any, data: Any, several: bool) -> None:
    """What only the loaded model can say."""
    encoder = objective.encoder
    for part in (part for part in encoder.modules() if isinstance(part, TextEncoder)):
        longest = max_row_length(part.backbone, part.tokenizer)
        if data.transform.max_length > longest:
            raise InputError(f"data.max_length={data.transform.max_length}, but the backbone takes {longest} tokens at most.")
    if isinstance(encoder, ImageEncoder) and encoder.mixes_rows():
        _batch_norm(encoder.execution, several)
    if objective.dropout_views and objective.view.alike and not objective.encoder.has_dropout():
        raise InputError(
            f"{type(objective).__name__} makes its two views by dropout, but this backbone has none: they would be equal. "
            "Use model.backbone.dropout=0.1, or another view, as view=token_cutoff."
        )


def _batch_norm(execution: Any, several: bool) -> None:
    if execution.recompute or execution.chunk_rows is not None:
        raise InputError(
            "model.norm=keep: the backbone normalises over a batch, which chunks (model.execution.chunk_rows, .recompute) "
            "would change. Use model.norm=group (weights from scratch) or model.norm=frozen (pretrained weights)."
        )
    if several:
        warnings.warn(
            "model.norm=keep: the backbone normalises over each process's part of the batch. trainer.sync_batchnorm=true "
            "normalises over all of it; with model.norm=group or frozen no row depends on another.",
            stacklevel=2,
        )


def _monitor(cfg: DictConfig) -> None:
    measured = OmegaConf.select(cfg, "validation.members") != {}
    if cfg.monitor and not (measured and str(cfg.monitor).startswith("val/")):
        raise InputError(
            f"monitor={cfg.monitor}: a metric of the validation is needed, val/..., and something must measure it: "
            "evaluation@validation=stsb_dev monitor=val/sts/stsb/spearman."
        )
    if cfg.callback.early_stopping and not cfg.monitor:
        raise InputError("callback=early_stopping needs a metric to watch: set monitor, as monitor=val/sts/stsb/spearman.")


def _batch(cfg: DictConfig) -> None:
    size, count = cfg.data.batch_size, num_processes(cfg) if cfg.trainer.num_nodes == 1 else 1
    if size < 2 * count:
        raise InputError(
            f"data.batch_size={size} rows over {count} processes leaves some with fewer than 2. "
            f"It counts the whole batch: use data.batch_size={2 * count} or more, or fewer trainer.devices."
        )
    steps = cfg.trainer.accumulate_grad_batches
    if steps > 1:
        warnings.warn(
            f"trainer.accumulate_grad_batches={steps} adds up {steps} losses of {size} rows each: a row is contrasted with "
            f"{size} keys, not {steps * size}. For more keys use data.batch_size={steps * size} with "
            "model.execution.recompute=true model.execution.chunk_tokens=4096, which needs no more memory.",
            stacklevel=2,
        )


def _precision(cfg: DictConfig) -> None:
    on_cpu = cfg.trainer.accelerator == "cpu" or (cfg.trainer.accelerator == "auto" and not torch.cuda.is_available())
    if on_cpu and "16" in str(cfg.trainer.precision) and not torch.cpu._is_avx512_bf16_supported():
        warnings.warn(
            f"trainer.precision={cfg.trainer.precision}: this CPU computes no half precision itself; steps get many times "
            "slower. Use trainer.precision=32-true.",
            stacklevel=2,
        )
