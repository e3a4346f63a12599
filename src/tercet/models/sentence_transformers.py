"""The settings and layers of a text encoder as sentence-transformers stores them: ``modules.json`` and a folder for each."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tercet.errors import InputError, require
from tercet.models.engine.transformers_compat import find_file
from tercet.models.pooling import NEEDS_ALL_LAYERS
from tercet.models.pretrained import read_json, write_json

if TYPE_CHECKING:
    from tercet.models.text import TextEncoder

_POOLING_MODES = {"cls": "cls", "cls_pooler": "cls", "max": "max", "last": "lasttoken"}  # others average: "mean"
_MODE_FLAGS = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens", "lasttoken": "lasttoken"}
_MODE_POOLINGS = {"cls": "cls", "mean": "mean", "max": "max", "lasttoken": "last"}
_ACTIVATIONS = {"linear": "torch.nn.modules.linear.Identity", "mlp": "torch.nn.modules.activation.Tanh"}  # by kind of head
_Module = tuple[str, dict[str, Any], dict[str, Tensor]]  # of sentence-transformers: kind, configuration, weights


def write_modules(encoder: "TextEncoder", folder: Path) -> None:
    """Add to a model folder what sentence-transformers needs to give the same embeddings."""
    if encoder.pooling in NEEDS_ALL_LAYERS:
        write_json(folder / "config.json", {**read_json(str(folder), "config.json"), "output_hidden_states": True})
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": encoder.max_length, "do_lower_case": False})
    modules = []
    for i, (kind, settings, weights) in enumerate(_modules(encoder)):
        path = f"{i}_{kind}" if i else ""
        (folder / path).mkdir(exist_ok=True)
        if settings:
            write_json(folder / path / "config.json", settings)
        if weights:
            save_file({k: v.cpu().contiguous() for k, v in weights.items()}, folder / path / "model.safetensors")
        modules.append({"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"})
    write_json(folder / "modules.json", modules)


def _modules(encoder: "TextEncoder") -> Iterator[_Module]:
    hidden, layers = encoder.backbone.config.hidden_size, encoder.backbone.config.num_hidden_layers
    yield "Transformer", {}, {}
    if encoder.pooling in NEEDS_ALL_LAYERS:
        chosen = {"first_last": 1, "static_last": 0, "top_two": layers - 1}[encoder.pooling]
        weight = torch.zeros(layers + 1)
        weight[[chosen, layers]] = 1.0
        config = {"word_embedding_dimension": hidden, "num_hidden_layers": layers, "layer_start": 0}
        yield "WeightedLayerPooling", config, {"layer_weights": weight}
    mode = _POOLING_MODES.get(encoder.pooling, "mean")
    flags = {f"pooling_mode_{flag}": mode == name for name, flag in _MODE_FLAGS.items()}
    yield "Pooling", {"word_embedding_dimension": hidden, **flags}, {}
    if encoder.pooling == "cls_pooler":
        yield _dense(encoder.backbone.pooler.dense, "mlp")  # type: ignore[union-attr]
    if encoder.head.layer is not None and not encoder.head.train_only:
        yield _dense(encoder.head.layer[0], "mlp" if encoder.head.tanh else "linear")  # type: ignore[index]
    if encoder.normalize:
        yield "Normalize", {}, {}


def _dense(linear: Any, kind: str) -> _Module:
    config = {"in_features": linear.in_features, "out_features": linear.out_features, "bias": True}
    weights = {"linear.weight": linear.weight.detach(), "linear.bias": linear.bias.detach()}
    return "Dense", {**config, "activation_function": _ACTIVATIONS[kind]}, weights


def read_modules(source: str, name: str) -> dict[str, Any] | None:
    """The settings in the files of sentence-transformers; None without such files."""
    modules = read_json(source, "modules.json")
    if modules is None:
        return None
    max_length = (read_json(source, "sentence_bert_config.json") or {}).get("max_seq_length")
    settings: dict[str, Any] = {"pooling": None, "head": {}, "normalize": False, "max_length": max_length}
    for module in modules[1:]:
        kind = module["type"].rsplit(".", 1)[-1]
        config = read_json(source, f"{module['path']}/config.json") or {}
        if kind == "Pooling":
            settings["pooling"] = _pooling_of_module(config, name)
        elif kind == "Dense" and not settings["head"]:
            activation, bias = config["activation_function"], config.get("bias", True)
            heads = [head for head, function in _ACTIVATIONS.items() if function == activation]
            found = f"its Dense has {activation}, bias {bias}; tercet runs {' and '.join(_ACTIVATIONS.values())}, with bias"
            require(heads and bias, f"`path_or_id`={name}: {found}.")
            settings["head"] = {"kind": heads[0], "dim": config["out_features"], "train_only": False}
            settings["weights"] = find_file(source, f"{module['path']}/model.safetensors")
        elif kind == "Normalize":
            settings["normalize"] = True
        else:
            raise InputError(f"`path_or_id`={name}: its module {module['type']} is not one that tercet can run.")
    return settings


def _pooling_of_module(config: dict[str, Any], name: str) -> str:
    modes = config.get("pooling_mode")
    if modes is None:
        names = {f"pooling_mode_{flag}": mode for mode, flag in _MODE_FLAGS.items()}
        modes = [names.get(key, key) for key, on in config.items() if key.startswith("pooling_mode_") and on]
    modes = [modes] if isinstance(modes, str) else list(modes)
    known = len(modes) == 1 and modes[0] in _MODE_POOLINGS
    require(known, f"`path_or_id`={name}: its pooling {modes} is not one of tercet's. Set `pooling`.")
    return _MODE_POOLINGS[modes[0]]
