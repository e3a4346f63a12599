"""A model by its name: a run, a checkpoint, a folder, the hub, or an entry of ``conf/model/``."""

import difflib
from pathlib import Path

import torch
from hydra import compose

from tercet.app.cli import config_folder
from tercet.app.components import build, raw_config
from tercet.errors import InputError
from tercet.messages import print_status
from tercet.models import Encoder
from tercet.models.checkpoint import load_encoder
from tercet.models.folder import load_folder
from tercet.models.onnx import NOTE, ONNXEncoder
from tercet.paths import locate


def open_model(name: str, pooling: str | None, device: str, seed: int | None = None) -> Encoder:
    """The encoder on its device; with ``seed``, which draws what is left to chance, also an entry of ``conf/model/``.

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
            raise InputError(f"model={name}: no such folder, and no entry of conf/model. Did you mean {near[0]}?")
    return _opened(name, path, pooling).to(device)


def _initialize(name: str, pooling: str | None, seed: int) -> Encoder:
    """The encoder that ``train.py model=<name>`` would start from; its vocabulary is counted in the command's data."""
    cfg = compose("train", [f"model={name}", *([f"model.pooling={pooling}"] if pooling else [])])
    if "data" in raw_config():
        cfg.data = raw_config().data
    torch.manual_seed(seed)
    print_status(f"model={name} of conf/model, seed {seed}")
    encoder: Encoder = build(cfg.model)
    return encoder


def _opened(name: str, path: Path, pooling: str | None) -> Encoder:
    if (path / NOTE).is_file():
        return ONNXEncoder(path)
    if path.is_file():
        if pooling:
            raise InputError(f"model.pooling={pooling}: a checkpoint records its own pooling. Leave model.pooling out.")
        return load_encoder(path)
    if (path / "metrics.json").is_file() and not (path / "model").is_dir():
        raise InputError(f"model={name} is a run without a model folder: it did not finish. Use a file of its checkpoints/.")
    if path.is_dir() and (path / "config.yaml").is_file():
        name = str(path / "model") if (path / "model").is_dir() else _newest(path)
        if name.endswith(".ckpt"):
            return load_encoder(name)
    elif path.suffix == ".ckpt":
        raise InputError(f"model={name}: there is no such file.")
    encoder, known = load_folder(name, pooling)
    poolings = dict.fromkeys(part.pooling for part in encoder.modules() if hasattr(part, "pooling"))
    print_status(f"pooling: {', '.join(map(str, poolings))} ({known})")
    return encoder


def _newest(run: Path) -> str:
    found = sorted((run / "checkpoints").glob("*.ckpt"), key=lambda p: (p.name != "best.ckpt", -p.stat().st_mtime))
    if not found:
        raise InputError(f"model={run} is a run without a model or a checkpoint: it stopped before its first one.")
    return str(found[0])


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
    heads = {key for key in {**mine, **theirs} if "head." in key and shape(mine, key) != shape(theirs, key)}
    for key in sorted({**mine, **theirs}):
        if key not in heads and shape(mine, key) != shape(theirs, key):
            raise InputError(
                f"init_from={name}: {key} is {shape(theirs, key)} there and {shape(mine, key)} here. Use the model that "
                "it was trained with."
            )
    encoder.load_state_dict({**mine, **{key: value for key, value in theirs.items() if key not in heads}})
    return f"init_from={name}" + ("; the head starts anew" if heads else "")


def shape(weights: dict[str, torch.Tensor], key: str) -> tuple[int, ...] | None:
    """Of a weight, or None where there is none."""
    return tuple(weights[key].shape) if key in weights else None
