"""The command ``evaluate``: open any model by its name, also one that was not trained by Tercet, and measure it."""

import difflib
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from tercet.app import config_folder, record, run_folder
from tercet.app.components import build, check_values, raw_config
from tercet.app.examples import examples_beside, write_examples
from tercet.errors import InputError, require
from tercet.messages import print_status
from tercet.models import CachedEncoder, ConcatEncoder, Encoder
from tercet.models.folder import check_device, load_with_note
from tercet.models.prompts import Prompts
from tercet.paths import atomic_write, check_writable, locate
from tercet.types import EncodeFunction

SEED = 1  # of weights that a choice of conf/model leaves to chance, for commands without a key `seed`


def run(cfg: DictConfig, output: Path) -> None:
    """Print the metrics, and write them to the file ``output``; figures, and the values by example, are written beside it."""
    target = Path(cfg.output) if cfg.output else None
    if target:
        require(target.suffix == ".json" and not target.is_dir(), f"output={target}: the name of a .json file is needed.")
        check_writable(target.parent, "output")
    check_values(OmegaConf.create({"evaluation": OmegaConf.to_container(cfg.evaluation, resolve=True)}), cfg)
    evaluator = build(cfg.evaluation)
    names = [cfg.model.path] if isinstance(cfg.model.path, str) else list(cfg.model.path)
    members = [CachedEncoder(open_member(cfg, str(name)), progress="evaluating") for name in names]
    encode: EncodeFunction = members[0] if len(members) == 1 else ConcatEncoder(members)
    metrics = evaluator(encode)
    show = getattr(evaluator, "table", None)
    print_status(show(metrics) if show else "\n".join(f"{name}  {value:.4f}" for name, value in metrics.items()))
    if target:
        record.write_metrics(target.parent, {f"test/{name}": value for name, value in metrics.items()}, target.name)
        drawn = evaluator.figures(encode) if hasattr(evaluator, "figures") else {}  # embeddings are cached
        for name, figure in drawn.items():
            with atomic_write(target.with_name(f"{target.stem}_{name}.png")) as partial:
                figure.savefig(partial, dpi=150)
        beside = [f"{target.stem}_{name}.png" for name in drawn]
        examples = examples_beside(target)
        beside += [examples.name] if write_examples(examples, evaluator, encode) else []
        print_status(", ".join([f"Written to {target}", *beside]))


def open_member(cfg: DictConfig, name: str) -> Encoder:
    """The model, with the command line's ``max_length``, ``prompt`` and ``normalize``."""
    encoder = open_model(name, cfg.model.pooling, cfg.device, cfg.get("seed", SEED), cfg.model.trust_remote_code)
    for key in ("max_length", "prompt", "normalize"):
        changed = not encoder.parts() and cfg.model[key] is not None
        require(not changed, f"model.{key}={cfg.model[key]}: an exported model cannot be changed. Export it anew.")
    texts, longest = encoder.text_parts(), cfg.model.max_length
    require(texts or not longest, f"model.max_length={longest} counts tokens; this model reads images.")
    for part in texts if longest else ():
        part.set_max_length(longest)
    require(texts or not cfg.model.prompt, f"model.prompt={cfg.model.prompt} is put before texts; this model reads images.")
    for part in texts if cfg.model.prompt is not None else ():
        part.prompts = replace(Prompts.of(cfg.model.prompt), pooled=part.prompts.pooled)
    for each in [encoder, *texts] if cfg.model.normalize is not None else ():
        each.normalize = cfg.model.normalize
    return encoder


def open_model(
    name: str, pooling: str | None, device: str, seed: int | None = SEED, trust_remote_code: bool = False, key: str = "model"
) -> Encoder:
    """Load a run, a checkpoint, a folder, a hub id or a choice of ``conf/model`` to a device; errors name the ``key``.

    A choice has the random weights that ``train.py model=<name>`` would start from, its vocabulary that of the command's data.
    """
    encoder, note = open_with_note(name, pooling, device, seed, trust_remote_code, key)
    if note:
        print_status(note)
    return encoder


def open_with_note(
    name: str, pooling: str | None, device: str, seed: int | None = SEED, trust_remote_code: bool = False, key: str = "model"
) -> tuple[Encoder, str]:
    """``open_model``, and one line on where pooling or weights come from; without a ``seed`` a choice is not looked for."""
    check_device(device)
    require(isinstance(name, str), f"{key}={name}: the name of one model is needed: a run, checkpoint, folder or hub id.")
    if seed is not None and not locate(name).exists() and "/" not in name:
        entries = sorted(entry.stem for entry in Path(config_folder(), "model").glob("*.yaml"))
        if name in entries:
            return _make_choice(name, pooling, seed).to(device).eval(), f"{key}={name} of conf/model, seed {seed}"
        if near := difflib.get_close_matches(name, entries, 1):
            raise InputError(f"{key}={name}: no such folder, and no choice of conf/model. Did you mean {near[0]}?")
    try:
        encoder, note = load_with_note(name, pooling=pooling, trust_remote_code=trust_remote_code)
    except InputError as error:
        run_folder.check_no_runs_inside(key, locate(name))
        keys = {"path_or_id": key, **{each: f"`model.{each}`" for each in ("pooling", "trust_remote_code")}}
        raise InputError(error.rename(keys)) from error
    return encoder.to(device), note


def _make_choice(name: str, pooling: str | None, seed: int) -> Encoder:
    # A process that encode or serve has started has not been begun by Hydra.
    begun = GlobalHydra.instance().is_initialized()
    with nullcontext() if begun else initialize_config_dir(config_folder(), version_base="1.3"):
        cfg = compose("train", [f"model={name}", *([f"model.pooling={pooling}"] if pooling else [])])
    if "data" in raw_config():
        cfg.data = raw_config().data
    torch.manual_seed(seed)
    return cast(Encoder, build(cfg.model))


def initialize_from(encoder: Encoder, name: str) -> str:
    """Give ``encoder`` the weights of a model; a head of another shape starts anew. Returns what to tell the user."""
    try:
        other = open_model(name, None, "cpu", seed=None, key="init_from")
    except InputError as error:
        raise InputError(str(error).replace("; model.trust_remote_code=true runs it", ": init_from never runs it")) from error
    words: list[dict[str, int]] = [getattr(getattr(part, "tokenizer", None), "get_vocab", dict)() for part in (encoder, other)]
    others = f"it reads other tokens ({len(words[1])}) than this model ({len(words[0])}), so that rows would be exchanged"
    advice = "Use its model.tokenizer.name; a vocabulary that is counted must be counted in the same data."
    require(words[0] == words[1], f"init_from={name}: {others}. {advice}")
    mine, theirs = encoder.state_dict(), other.state_dict()
    here, there = ({key: tuple(weight.shape) for key, weight in state.items()} for state in (mine, theirs))
    reshaped = sorted(key for key in {**here, **there} if here.get(key) != there.get(key))
    for key in reshaped:
        shapes = f"{there.get(key)} there and {here.get(key)} here"
        require("head." in key, f"init_from={name}: {key} is {shapes}. Use the model that it was trained with.")
    encoder.load_state_dict({**mine, **{key: value for key, value in theirs.items() if key not in reshaped}})
    settings = {key: (theirs, ours) for key, theirs in _settings(other).items() if (ours := _settings(encoder)[key]) != theirs}
    differ = "".join(f"; its {key} is {theirs}, here {ours}" for key, (theirs, ours) in settings.items())
    anew = "; the head starts anew" if any("head." in key for key in mine) else "; its head is left out"
    return f"init_from={name}" + (anew if reshaped else "") + differ


def _settings(encoder: Encoder) -> dict[str, str]:
    """What decides on embeddings beside the weights, as text."""
    parts = encoder.text_parts()
    return {
        "pooling": ", ".join(part.pooling for part in encoder.parts()),
        "normalize": ", ".join(str(part.normalize).lower() for part in encoder.parts()),
        "max_length": ", ".join(str(part.max_length) for part in parts),
        "prompt": repr(parts[0].prompts.text if parts else ""),
    }
