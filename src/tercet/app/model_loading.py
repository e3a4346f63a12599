"""Open a model by its name: a run, a checkpoint, a folder, a hub id, or a choice of ``conf/model``."""

import difflib
from pathlib import Path

import torch
from hydra import compose

from tercet.app.cli import config_folder
from tercet.app.components import build, raw_config
from tercet.errors import InputError
from tercet.messages import print_status
from tercet.models import Encoder
from tercet.models.loading import load_with_note
from tercet.paths import locate


def open_model(name: str, pooling: str | None, device: str, seed: int | None = None) -> Encoder:
    """Load an encoder to a device; with a ``seed`` for random weights, ``name`` may also be a choice of ``conf/model``.

    Raises:
        InputError: there is no such model, or no such device.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"device={device}, but torch sees no GPU here. Use device=cpu.")
    path = locate(name)
    entries = sorted(entry.stem for entry in Path(config_folder(), "model").glob("*.yaml"))
    if seed is not None and not path.exists() and "/" not in name:
        if name in entries:
            return _initialize(name, pooling, seed).to(device)
        if near := difflib.get_close_matches(name, entries, 1):
            raise InputError(f"model={name}: no such folder, and no choice of conf/model. Did you mean {near[0]}?")
    return _open(name, pooling).to(device)


def _initialize(name: str, pooling: str | None, seed: int) -> Encoder:
    """The encoder that ``train.py model=<name>`` would start from; its vocabulary is counted in the command's data."""
    cfg = compose("train", [f"model={name}", *([f"model.pooling={pooling}"] if pooling else [])])
    if "data" in raw_config():
        cfg.data = raw_config().data
    torch.manual_seed(seed)
    print_status(f"model={name} of conf/model, seed {seed}")
    encoder: Encoder = build(cfg.model)
    return encoder


def _open(name: str, pooling: str | None) -> Encoder:
    try:
        encoder, note = load_with_note(name, pooling=pooling)
    except InputError as error:
        raise InputError(error.rename({"path_or_id": "model", "pooling": "`model.pooling`"})) from error
    if note:
        print_status(note)
    return encoder


def initialize_from(encoder: Encoder, name: str) -> str:
    """Give ``encoder`` the weights of a model; a head of another shape starts anew. Returns what to tell the user.

    Raises:
        InputError: there is no such model, or the backbones or the tokenizers differ.
    """
    try:
        other = open_model(name, None, "cpu")
    except InputError as error:
        raise InputError(str(error).replace("model=", "init_from=", 1)) from error
    words: list[dict[str, int]] = [getattr(getattr(part, "tokenizer", None), "get_vocab", dict)() for part in (encoder, other)]
    if words[0] != words[1]:
        raise InputError(
            f"init_from={name}: it reads other tokens ({len(words[1])}) than this model ({len(words[0])}), so that rows would "
            "be exchanged. Use its model.tokenizer.name; a vocabulary that is counted must be counted in the same data."
        )
    mine, theirs = encoder.state_dict(), other.state_dict()
    heads = {key for key in {**mine, **theirs} if "head." in key and _shape(mine, key) != _shape(theirs, key)}
    for key in sorted({**mine, **theirs}):
        if key not in heads and _shape(mine, key) != _shape(theirs, key):
            raise InputError(
                f"init_from={name}: {key} is {_shape(theirs, key)} there and {_shape(mine, key)} here. Use the model that "
                "it was trained with."
            )
    encoder.load_state_dict({**mine, **{key: value for key, value in theirs.items() if key not in heads}})
    return f"init_from={name}" + ("; the head starts anew" if heads else "")


def _shape(weights: dict[str, torch.Tensor], key: str) -> tuple[int, ...] | None:
    return tuple(weights[key].shape) if key in weights else None
