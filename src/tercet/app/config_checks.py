"""Checks across components, before any data is loaded: what one declares that it needs, another must provide."""

import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from tercet.app.components import build, find_targets, locate_target, settable_key, walk
from tercet.app.hydra_compat import config_folders
from tercet.app.launch import num_devices, num_processes, set_precision, started_by_launcher
from tercet.app.record import ARTIFACTS
from tercet.app.run_files import is_smaller_better, metric_kind
from tercet.distributed.sharding import layers_to_shard
from tercet.errors import InputError, check_choice, require
from tercet.evaluation.direction import SMALLER_IS_BETTER
from tercet.messages import warn_once
from tercet.models.engine.transformers_compat import pretrained_source
from tercet.models.folder import DTYPES
from tercet.models.sentence_transformers import default_prompt

NEEDS = {  # what a component can declare that it needs, and how a user provides it
    "label": "labels: data.label=<column>",
    "position": "the document of each sentence and its place there: data.label=<column> data.position=<column>",
    "all_rows": "all rows before the first batch: data.streaming=false",
    "same_label": "several rows of a label in each batch",
    "adjacent": "neighboring sentences in each batch",
    "pairs": "two columns: data.columns=[<first>,<second>]",
}
EQUAL_VIEWS = "they would be equal. Use model.backbone.dropout=0.1, or another view, as view=token_cutoff."


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
    _trainer(cfg)
    _optimizer(cfg)
    require(cfg.artifacts in (*ARTIFACTS, None), f"artifacts={cfg.artifacts}: choose one of {', '.join(ARTIFACTS)}, or null.")


def choices(group: str, accept: Callable[[Any], bool]) -> str:
    """The choices of a group whose target is accepted, as a user gives them: ``sampler=pk or sampler=window``."""
    found = []
    for path in sorted(path for folder in config_folders() for path in Path(folder, group).glob("*.yaml")):
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        node = content.get(group, content) if isinstance(content, dict) else {}
        if isinstance(node, dict) and "_target_" in node and accept(get_object(node["_target_"])):
            found.append(f"{group}={path.stem}")
    return " or ".join(dict.fromkeys(found))


def set_derived(cfg: DictConfig) -> None:
    """Set what other settings, the evaluators and the device decide where it is left to them."""
    set_monitor_mode(cfg)
    set_precision(cfg)


def set_monitor_mode(cfg: DictConfig) -> None:
    """Set ``monitor_mode`` where it is null, as the evaluators declare, and the mode of the callbacks that follow it.

    ``smaller_is_better`` is set to the metrics' names, for the record.
    """
    accepted = f"monitor_mode={cfg.monitor_mode}: choose max, min, or null (as the metric's evaluator declares)."
    require(cfg.monitor_mode in (None, "max", "min"), accepted)
    plain: Any = OmegaConf.to_container(cfg)
    kinds = [kind for stage in ("validation", "test") for kind in _evaluator_classes(plain.get(stage))]
    names = SMALLER_IS_BETTER.union(*(_declared(kind, "smaller_is_better") for kind in kinds))
    mode = cfg.monitor_mode or monitor_mode(cfg, str(cfg.monitor)) or "max"
    if cfg.monitor:
        name = {metric_kind(str(cfg.monitor))}
        names = names | name if mode == "min" else names - name
    cfg.monitor_mode, cfg.smaller_is_better = mode, sorted(names)
    for callback in cfg.callback.values():
        if callback and "mode" in callback and callback.mode is None:
            callback.mode = mode


def monitor_mode(cfg: DictConfig, metric: str) -> str | None:
    """Which way a metric of validation is better, ``max`` or ``min``; None for no metric, ``InputError`` if it is unknown."""
    if metric == "None":
        return None
    if cfg.monitor_mode and metric == cfg.monitor:
        return str(cfg.monitor_mode)
    plain: Any = OmegaConf.to_container(cfg, resolve=False)
    kinds = _evaluator_classes(plain["validation"])
    if is_smaller_better(metric, SMALLER_IS_BETTER.union(*(_declared(kind, "smaller_is_better") for kind in kinds))):
        return "min"
    unknown = ", ".join(kind.__name__ for kind in kinds if not hasattr(kind, "smaller_is_better"))
    fault = f"monitor={metric}: whether more of it is better is not known, as {unknown} does not declare smaller_is_better"
    require(not unknown, f"{fault}. Set monitor_mode=max or monitor_mode=min.")
    return "max"


def _evaluator_classes(node: Any) -> list[Any]:
    """The targets of the evaluators in a node, without those of their sources."""
    if not node:
        return []
    if "members" in node:
        return [kind for member in (node["members"] or {}).values() for kind in _evaluator_classes(member)]
    return [locate_target(node, "")] if "_target_" in node else []


def _declared(component: Any, name: str) -> frozenset[str]:
    return frozenset(getattr(component, name, ()))


def _batch_needs(objective: Any, num_columns: int) -> frozenset[str]:
    return frozenset(objective.needs(num_columns)) if hasattr(objective, "needs") else frozenset()


def _words(needs: Iterable[str]) -> str:
    return "; ".join(NEEDS.get(need, need) for need in sorted(needs))


def _takes_columns(objective: Any, count: int) -> bool:
    fewest, most = getattr(objective, "columns", (1, count))
    return bool(fewest <= count <= most)


def _columns(cfg: DictConfig, objective: Any, data: Any) -> None:
    count = len(data.columns)
    fewest, most = getattr(objective, "columns", (1, count))
    if not fewest <= count <= most:
        provided = _declared(get_object(cfg.sampler._target_), "provides")
        fitting = choices("objective", lambda o: o.columns[0] <= count <= o.columns[1] and _batch_needs(o, count) <= provided)
        wanted = str(fewest) if fewest == most else f"{fewest} to {most}"
        advice = f"Name them with data.columns=[...], or use {fitting or 'other data'}."
        found = f"data={data.name} has {count} ({', '.join(data.columns)})"
        raise InputError(f"{objective.__name__} needs {wanted} columns, but {found}. {advice}")


def _views(cfg: DictConfig, objective: Any) -> None:
    identical, makes_views = getattr(build(cfg.view), "identical", False), getattr(objective, "makes_views", False)
    if not identical and not makes_views:
        nodes = [node for key, node in find_targets(OmegaConf.to_container(cfg.view)) if key]
        edits = " and ".join(node["_target_"].rsplit(".", 1)[-1] for node in nodes)
        advice = f"Use view=dropout, or {choices('objective', lambda o: getattr(o, 'makes_views', False))}."
        raise InputError(f"{objective.__name__} makes no views, but view edits texts by {edits}. {advice}")
    if makes_views and identical and OmegaConf.select(cfg, "model.backbone.dropout") == 0:
        raise InputError(f"{objective.__name__} makes its two views by dropout, but model.backbone.dropout=0: {EQUAL_VIEWS}")


def _batches(cfg: DictConfig, objective: Any, data: Any) -> None:
    """The sampler gets what it needs from the data, and gives the objective what it needs."""
    sampler, count = get_object(cfg.sampler._target_), len(data.columns)
    given = getattr(getattr(data, "source", None), "provides", None)
    needed = _batch_needs(objective, count)
    of_sampler = needed - {"label"}
    if given is not None and (missing := (_declared(sampler, "needs") | needed & {"label"}) - given):
        fits = lambda s: _declared(s, "needs") <= given and of_sampler <= _declared(s, "provides")  # noqa: E731
        free = lambda o: o is not objective and not _batch_needs(o, count) and _takes_columns(o, count)  # noqa: E731
        # The test of labels, which an objective brings along, would be the next error with any sampler.
        tested = any(missing & _declared(kind, "needs") for kind in _evaluator_classes(OmegaConf.to_container(cfg.test)))
        samplers = "" if tested or missing & needed else choices("sampler", fits)
        other = f"sampler: {samplers}" if samplers else f"objective: {choices('objective', free)}"
        where = f"{sampler.__name__ if samplers else objective.__name__} needs what data={data.name} does not provide"
        raise InputError(f"{where}: {_words(missing)}. Or use another {other}.")
    if missing := needed - _declared(sampler, "provides") - {"label"}:
        fitting = choices("sampler", lambda s: missing <= _declared(s, "provides"))
        advice = f"{sampler.__name__} leaves that to chance. Use {fitting or 'another sampler'}."
        raise InputError(f"{objective.__name__} on {count} column(s) needs {_words(missing)}. {advice}")


def _loss(cfg: DictConfig, objective: Any, data: Any) -> None:
    node, positives = OmegaConf.select(cfg, "objective.loss"), getattr(objective, "positives", "none")
    if node is None or positives == "none":
        return
    loss = build(node)
    name, usable = type(loss).__name__, getattr(loss, "positives", None)
    if usable is not None and positives not in usable:
        fitting = choices("loss", lambda kind: positives in _declared(kind, "positives"))
        matching = choices("objective", lambda o: getattr(o, "positives", None) in usable)
        taken = f"{name} takes positives by {' or '.join(sorted(usable))}"
        advice = f"Use {fitting or 'another loss'}, or {matching or 'another objective'}."
        raise InputError(f"{objective.__name__} has positives by {positives}, but {taken}. {advice}")
    if getattr(loss, "needs_hard_negatives", False) and (getattr(objective, "makes_views", False) or len(data.columns) < 3):
        weight = OmegaConf.select(node, "hard_negative_weight")
        setting = f"loss.hard_negative_weight={weight}" if weight else f"{name} needs hard negatives"
        has = f"{objective.__name__} on data={data.name} has the columns {', '.join(data.columns)}"
        advice = f"Use data with a third column{', or loss.hard_negative_weight=0' if weight else ''}."
        raise InputError(f"{setting}, but there are no hard negatives: {has}. {advice}")


def _evaluators(cfg: DictConfig) -> None:
    """An evaluator gets what it needs from its source of rows."""
    for key, node in find_targets(OmegaConf.to_container(cfg.test), "test"):
        evaluator = get_object(node["_target_"])
        needed = _declared(evaluator, "needs")
        source = build(OmegaConf.select(cfg, f"{key}.source")) if needed and node.get("source") else None
        pairs = {"pairs"} if len(getattr(source, "columns", ())) > 1 else set()
        if missing := needed - getattr(source, "provides", needed) - pairs:
            where = f"{evaluator.__name__} ({key}) needs what its source {settable_key(key, 'source')} does not provide"
            raise InputError(f"{where}: {_words(missing)}. Or use another evaluation, as evaluation@test=sts.")


def _shares(cfg: DictConfig) -> None:
    strategy = cfg.trainer.strategy
    require(strategy == "fsdp2", f"trainer.strategy={strategy}: choose fsdp2 (trainer=fsdp), or trainer=ddp.")
    for key, why in (
        ("objective.mlm.weight", "the language-model head shares the embeddings' weights"),
        ("loss.learn_temperature", "the temperature is no part of the encoder"),
    ):
        setting = f"{key}={str(OmegaConf.select(cfg, key)).lower()} with trainer.strategy=fsdp2"
        require(not OmegaConf.select(cfg, key), f"{setting}: only the encoder is shared out, and {why}. Use trainer=ddp.")
    tokens, recompute = (OmegaConf.select(cfg, f"model.execution.{key}") for key in ("chunk_tokens", "recompute"))
    measured = "model.execution.chunk_tokens=auto with model.execution.recompute=true and trainer.strategy=fsdp2"
    require(not (tokens == "auto" and recompute), f"{measured}: processes would measure different numbers. Give one, as 16384.")


def _devices(cfg: DictConfig) -> None:
    if "fsdp" in str(cfg.trainer.strategy):
        _shares(cfg)
    accelerator, devices, there = cfg.trainer.accelerator, cfg.trainer.devices, torch.cuda.device_count()
    if accelerator in ("gpu", "cuda") and not there and not torch.backends.mps.is_available():
        advice = "Use trainer=cpu, or trainer=ddp_cpu for two processes (and trainer.precision=32-true)."
        raise InputError(f"trainer.accelerator={accelerator}, but torch sees no GPU here. {advice}")
    if cfg.trainer.num_nodes > 1:
        return
    several = num_processes(cfg)
    if (started := started_by_launcher()) and int(os.environ.get("WORLD_SIZE", several)) != several:
        uses = f"trainer.strategy={cfg.trainer.strategy} trainer.devices={devices} uses {several}"
        advice = "Use trainer=ddp or ddp_cpu with as many trainer.devices."
        raise InputError(f"{os.environ['WORLD_SIZE']} processes were started, but {uses}. {advice}")
    if not started and several == 1 and num_devices(cfg) > 1:
        raise InputError(f"trainer.devices={devices} needs a strategy: trainer=ddp, or trainer=ddp_cpu.")
    if accelerator in ("gpu", "cuda", "auto") and 0 < there < several:
        raise InputError(f"trainer.devices={devices}, but this machine has {there}. Use trainer.devices={there}.")


def check_model(objective: Any, data: Any, several: bool, sharded: bool = False) -> None:
    """Raise ``InputError`` for what only the loaded model shows: its length, layers, dropout and batch normalization."""
    encoder = objective.encoder
    if sharded:
        layers_to_shard(encoder)
    for part in encoder.text_parts():
        length, longest = data.transform.max_length, part.token_info().max_length
        require(length <= longest, f"data.max_length={length}, but the backbone takes {longest} tokens at most.")
        own = default_prompt(pretrained_source(part.backbone))
        if own and part.prompts.text != own:
            warnings.warn(f"The backbone's folder puts {own!r} before each text: set model.prompt to do so.", stacklevel=2)
    if encoder.mixes_rows():
        _batch_norm(encoder.execution, several)
    if objective.makes_views and objective.view.identical and not encoder.has_dropout():
        name = type(objective).__name__
        raise InputError(f"{name} makes its two views by dropout, but this backbone has none: {EQUAL_VIEWS}")


def _reads_test_rows(node: DictConfig) -> bool:
    """Whether a component below this node reads rows of the split test."""
    parts = walk(OmegaConf.to_container(node, resolve=True))
    return any(isinstance(part, dict) and part.get("split") == "test" for _, part in parts)


def _batch_norm(execution: Any, several: bool) -> None:
    norm = "model.norm=keep: the backbone normalizes over"
    if execution.recompute or execution.chunk_rows is not None:
        advice = "Use model.norm=group (weights from scratch) or model.norm=frozen (pretrained weights)."
        raise InputError(f"{norm} a batch, which chunks (model.execution.chunk_rows, .recompute) would change. {advice}")
    if several:
        advice = "trainer.sync_batchnorm=true normalizes over all of it; with model.norm=group or frozen rows are independent."
        warnings.warn(f"{norm} each process's part of the batch. {advice}", stacklevel=2)


def _optimizer(cfg: DictConfig) -> None:
    """The optimizer and the scheduler check their parameters when they are made, which training does after the data is read."""
    optimizer = build(cfg.optimizer)(torch.nn.Linear(1, 1))
    build(cfg.scheduler)(optimizer, 1)


def _trainer(cfg: DictConfig) -> None:
    """The batch on each process, the metric that selects the model, and the precision."""
    size, count = cfg.data.batch_size, num_processes(cfg) if cfg.trainer.num_nodes == 1 else 1
    advice = f"It counts the whole batch: use data.batch_size={2 * count} or more, or fewer trainer.devices."
    require(size >= 2 * count, f"data.batch_size={size} rows over {count} processes leaves some with fewer than 2. {advice}")
    if (steps := cfg.trainer.accumulate_grad_batches) > 1:
        what = f"adds up {steps} losses of {size} rows each: a row is contrasted with {size} keys, not {steps * size}"
        chunks = "model.execution.recompute=true model.execution.chunk_tokens=auto, whose chunks fit into memory"
        advice = f"For more keys use data.batch_size={steps * size} with {chunks}."
        warnings.warn(f"trainer.accumulate_grad_batches={steps} {what}. {advice}", stacklevel=2)
    if str(cfg.optimized_metric).startswith("test/"):
        why = "settings that are chosen by a test look better than they are on other data"
        warn_once(f"optimized_metric={cfg.optimized_metric}: {why}. Choose by validation, as val/sts/stsb/spearman.")
    if any(str(name).startswith("val/") for name in (cfg.optimized_metric, cfg.monitor)) and _reads_test_rows(cfg.validation):
        why = "what is chosen by them looks better than on other data"
        advice = "Choose by held-out rows of the training data, or by split=dev"
        warn_once(f"evaluation@validation reads rows with split=test: {why}. {advice}.")
    measured = OmegaConf.select(cfg, "validation.members") != {} and str(cfg.monitor).startswith("val/")
    example = "as evaluation@validation=stsb_dev monitor=val/sts/stsb/spearman."
    require(measured or not cfg.monitor, f"monitor={cfg.monitor}: a metric that the validation measures is needed, {example}")
    early = cfg.callback.early_stopping
    require(cfg.monitor or not early, f"callback=early_stopping needs a metric to watch: set monitor, {example}")
    check_choice("save_dtype", cfg.save_dtype, DTYPES)
    accelerator = cfg.trainer.accelerator
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available())
    if on_cpu and "16" in str(cfg.trainer.precision) and not torch.cpu.get_capabilities().get("avx512_bf16"):
        why = "this CPU computes no half precision itself; steps get many times slower. Use trainer.precision=32-true."
        warnings.warn(f"trainer.precision={cfg.trainer.precision}: {why}", stacklevel=2)
