"""Checks across components, before any data is loaded: what one declares that it needs, another must provide."""

import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from tercet.app.components import build, find_targets, settable_key
from tercet.app.hydra_compat import config_folders
from tercet.app.launch import num_processes, started_by_launcher
from tercet.app.record import ARTIFACTS
from tercet.errors import InputError

NEEDS = {  # what a component can declare that it needs, and how a user provides it
    "label": "labels: data.label=<column>",
    "position": "the document of each sentence and its place there: data.label=<column> data.position=<column>",
    "all_rows": "all rows before the first batch: data.streaming=false",
    "same_label": "several rows of a label in each batch",
    "adjacent": "neighboring sentences in each batch",
    "pairs": "two columns: data.columns=[<first>,<second>]",
}


def check_config(cfg: DictConfig, objective: Any, data: Any) -> None:
    """Raise ``InputError`` for combinations that cannot work; warn about those that mean something else than they seem.

    ``objective`` is the class of the objective, ``data`` the data module. A component that declares nothing needs nothing.
    """
    _columns(cfg, objective, data)
    _views(cfg, objective)
    _batches(cfg, objective, data)
    _loss(cfg, objective, data)
    _evaluators(cfg)
    _devices(cfg)
    _batch_size(cfg)
    _monitor(cfg)
    _precision(cfg)
    if cfg.artifacts not in (*ARTIFACTS, None):
        raise InputError(f"artifacts={cfg.artifacts}: choose one of {', '.join(ARTIFACTS)}, or null.")


def choices(group: str, accept: Callable[[Any], bool]) -> str:
    """The choices of a group whose target is accepted, as a user gives them: ``sampler=pk or sampler=window``."""
    found = []
    for path in sorted(path for folder in config_folders() for path in Path(folder, group).glob("*.yaml")):
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        node = content.get(group, content) if isinstance(content, dict) else {}
        if isinstance(node, dict) and "_target_" in node and accept(get_object(node["_target_"])):
            found.append(f"{group}={path.stem}")
    return " or ".join(dict.fromkeys(found))


def _declared(component: Any, name: str) -> frozenset[str]:
    return frozenset(getattr(component, name, ()))


def _batch_needs(objective: Any, num_columns: int) -> frozenset[str]:
    return frozenset(objective.needs(num_columns)) if hasattr(objective, "needs") else frozenset()


def _words(needs: Iterable[str]) -> str:
    return "; ".join(NEEDS.get(need, need) for need in sorted(needs))


def _chosen(cfg: DictConfig, group: str) -> str:
    return str(cfg[group]._target_).rsplit(".", 1)[-1]


def _columns(cfg: DictConfig, objective: Any, data: Any) -> None:
    fewest, most = getattr(objective, "columns", (1, len(data.columns)))
    count = len(data.columns)
    if fewest <= count <= most:
        return
    provided = _declared(get_object(cfg.sampler._target_), "provides")
    fitting = choices("objective", lambda o: o.columns[0] <= count <= o.columns[1] and _batch_needs(o, count) <= provided)
    wanted = str(fewest) if fewest == most else f"{fewest} to {most}"
    raise InputError(
        f"{_chosen(cfg, 'objective')} needs {wanted} columns, but data={data.name} has {count} "
        f"({', '.join(data.columns)}). Name them with data.columns=[...], or use {fitting or 'other data'}."
    )


def _views(cfg: DictConfig, objective: Any) -> None:
    identical = getattr(build(cfg.view), "identical", False)
    makes_views = getattr(objective, "makes_views", False)
    if not identical and not makes_views:
        nodes = [node for key, node in find_targets(OmegaConf.to_container(cfg.view)) if key]
        edits = " and ".join(node["_target_"].rsplit(".", 1)[-1] for node in nodes)
        making = choices("objective", lambda o: getattr(o, "makes_views", False))
        raise InputError(
            f"{_chosen(cfg, 'objective')} makes no views, but view edits texts by {edits}. Use view=dropout, or {making}."
        )
    if makes_views and identical and OmegaConf.select(cfg, "model.backbone.dropout") == 0:
        raise InputError(
            f"{_chosen(cfg, 'objective')} makes its two views by dropout, but model.backbone.dropout=0: they would be equal. "
            "Use model.backbone.dropout=0.1 or null, or another view, as view=token_cutoff."
        )


def _batches(cfg: DictConfig, objective: Any, data: Any) -> None:
    """The sampler gets what it needs from the data, and gives the objective what it needs."""
    sampler = get_object(cfg.sampler._target_)
    needed, given = _declared(sampler, "needs"), getattr(getattr(data, "source", None), "provides", None)
    if given is not None and (missing := needed - given):
        other = choices("sampler", lambda s: _declared(s, "needs") <= given)
        raise InputError(
            f"{_chosen(cfg, 'sampler')} needs what data={data.name} does not provide: {_words(missing)}. "
            f"Or use another sampler: {other}."
        )
    needed = _batch_needs(objective, len(data.columns))
    if missing := needed - _declared(sampler, "provides"):
        fitting = choices("sampler", lambda s: missing <= _declared(s, "provides"))
        raise InputError(
            f"{_chosen(cfg, 'objective')} on {len(data.columns)} column(s) needs {_words(missing)}. {_chosen(cfg, 'sampler')} "
            f"leaves that to chance. Use {fitting or 'another sampler'}."
        )


def _loss(cfg: DictConfig, objective: Any, data: Any) -> None:
    node = OmegaConf.select(cfg, "objective.loss")
    positives = getattr(objective, "positives", "none")
    if node is None or positives == "none":
        return
    loss = build(node)
    usable = getattr(loss, "positives", None)
    if usable is not None and positives not in usable:
        fitting = choices("loss", lambda kind: positives in _declared(kind, "positives"))
        matching = choices("objective", lambda o: getattr(o, "positives", None) in usable)
        raise InputError(
            f"{_chosen(cfg, 'objective')} has positives by {positives}, but {type(loss).__name__} takes positives by "
            f"{' or '.join(sorted(usable))}. Use {fitting or 'another loss'}, or {matching or 'another objective'}."
        )
    if getattr(loss, "needs_hard_negatives", False) and (getattr(objective, "makes_views", False) or len(data.columns) < 3):
        weight = OmegaConf.select(node, "hard_negative_weight")
        setting = f"loss.hard_negative_weight={weight}" if weight else f"{type(loss).__name__} needs hard negatives"
        raise InputError(
            f"{setting}, but there are no hard negatives: {_chosen(cfg, 'objective')} on data={data.name} has the columns "
            f"{', '.join(data.columns)}. Use data with a third column{', or loss.hard_negative_weight=0' if weight else ''}."
        )


def _evaluators(cfg: DictConfig) -> None:
    """An evaluator gets what it needs from its source of rows."""
    for key, node in find_targets(OmegaConf.to_container(cfg.test), "test"):
        needed = _declared(get_object(node["_target_"]), "needs")
        source = build(OmegaConf.select(cfg, f"{key}.source")) if needed and node.get("source") else None
        if source is None or not hasattr(source, "provides"):
            continue
        if missing := needed - source.provides - ({"pairs"} if len(source.columns) > 1 else set()):
            raise InputError(
                f"{node['_target_'].rsplit('.', 1)[-1]} ({key}) needs what its source {settable_key(key, 'source')} does not "
                f"provide: {_words(missing)}. Or use another evaluation, as evaluation@test=sts."
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
    """Raise ``InputError`` for what only the loaded model shows: its length, its dropout, its batch normalization."""
    encoder = objective.encoder
    for part in encoder.text_parts():
        longest = part.token_info().max_length
        if data.transform.max_length > longest:
            raise InputError(f"data.max_length={data.transform.max_length}, but the backbone takes {longest} tokens at most.")
    if encoder.mixes_rows():
        _batch_norm(encoder.execution, several)
    if objective.makes_views and objective.view.identical and not objective.encoder.has_dropout():
        raise InputError(
            f"{type(objective).__name__} makes its two views by dropout, but this backbone has none: they would be equal. "
            "Use model.backbone.dropout=0.1, or another view, as view=token_cutoff."
        )


def _batch_norm(execution: Any, several: bool) -> None:
    if execution.recompute or execution.chunk_rows is not None:
        raise InputError(
            "model.norm=keep: the backbone normalizes over a batch, which chunks (model.execution.chunk_rows, .recompute) "
            "would change. Use model.norm=group (weights from scratch) or model.norm=frozen (pretrained weights)."
        )
    if several:
        warnings.warn(
            "model.norm=keep: the backbone normalizes over each process's part of the batch. trainer.sync_batchnorm=true "
            "normalizes over all of it; with model.norm=group or frozen no row depends on another.",
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


def _batch_size(cfg: DictConfig) -> None:
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
    if on_cpu and "16" in str(cfg.trainer.precision) and not torch.cpu.get_capabilities().get("avx512_bf16"):
        warnings.warn(
            f"trainer.precision={cfg.trainer.precision}: this CPU computes no half precision itself; steps get many times "
            "slower. Use trainer.precision=32-true.",
            stacklevel=2,
        )
