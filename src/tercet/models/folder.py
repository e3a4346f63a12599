"""A model as a folder: weights, tokenizer, and how its vectors are made, so that nobody can pick the wrong pooling.

The layout is the one of sentence-transformers (``modules.json``), which opens it with the same vectors, and of
transformers (``config.json``, ``model.safetensors``); ``tercet.json`` adds what neither knows (a head for training only).
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from tercet.errors import InputError
from tercet.images import PixelFormat
from tercet.models.dual import DualEncoder
from tercet.models.engine.chunking import PLAIN
from tercet.models.image import ImageEncoder
from tercet.models.pooling import NEEDS_ALL_LAYERS, Head
from tercet.models.pretrained import PREPROCESSOR, load_pretrained, parse_pixel_format, resolve_source
from tercet.models.text import Encoder, TextEncoder
from tercet.models.words import WordModel

SETTINGS = "tercet.json"
SIDES = ("f", "g")
_MODES = {"cls": "cls", "cls_pooler": "cls", "max": "max", "last": "lasttoken"}
_FLAGS = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens", "lasttoken": "lasttoken"}
_OURS = {"cls": "cls", "mean": "mean", "max": "max", "lasttoken": "last"}
_ACTIVATIONS = {"none": "torch.nn.modules.linear.Identity", "tanh": "torch.nn.modules.activation.Tanh"}


def save_model(encoder: Encoder, path: str | Path) -> None:
    """Write the folder."""
    folder = Path(path)
    if isinstance(encoder, DualEncoder):
        for name in SIDES:
            save_model(getattr(encoder, name), folder / name)
        _write(folder / SETTINGS, encoder.settings())
        return
    encoder.backbone.save_pretrained(folder)
    _write(folder / SETTINGS, encoder.settings())
    if encoder.head.kind != "none":
        save_file({k: v.contiguous() for k, v in encoder.head.state_dict().items()}, folder / "head.safetensors")
    if isinstance(encoder, ImageEncoder):
        _write(folder / PREPROCESSOR, _preprocessor(encoder.pixels))
    elif isinstance(encoder, TextEncoder):
        _save_text(encoder, folder)


def _preprocessor(pixels: PixelFormat) -> dict[str, Any]:
    """The same in the words of transformers."""
    return {
        "image_processor_type": "ViTImageProcessor", "do_rescale": True, "rescale_factor": 1 / 255, "do_resize": True,
        "size": {"shortest_edge": pixels.size}, "do_center_crop": True,
        "crop_size": {"height": pixels.size, "width": pixels.size}, "do_normalize": True, "resample": 3,
        "image_mean": list(pixels.mean), "image_std": list(pixels.std),
    }  # fmt: skip


def _save_text(encoder: TextEncoder, folder: Path) -> None:
    encoder.tokenizer.save_pretrained(folder)
    if isinstance(encoder.backbone, WordModel) or (encoder.normalize and encoder.num_outputs > 1):
        return  # sentence-transformers has no module that would give the same vectors
    if encoder.pooling in NEEDS_ALL_LAYERS:
        _update(folder / "config.json", output_hidden_states=True)
    _write(folder / "sentence_bert_config.json", {"max_seq_length": encoder.max_length, "do_lower_case": False})
    _write(folder / "modules.json", [{"idx": 0, "name": "0", "path": "", "type": _type("Transformer")}])
    for kind, config, weights in _modules(encoder):
        _add(folder, kind, config, weights)


def _modules(encoder: TextEncoder) -> list[tuple[str, dict[str, Any], dict[str, Tensor]]]:
    """What follows the transformer in sentence-transformers' words: kind, configuration, weights."""
    hidden = encoder.backbone.config.hidden_size
    layers = encoder.backbone.config.num_hidden_layers
    modules: list[tuple[str, dict[str, Any], dict[str, Tensor]]] = []
    if encoder.pooling in NEEDS_ALL_LAYERS:
        chosen = {"first_last": 1, "static_last": 0, "top_two": layers - 1}[encoder.pooling]
        weight = torch.zeros(layers + 1)
        weight[[chosen, layers]] = 1.0
        config = {"word_embedding_dimension": hidden, "num_hidden_layers": layers, "layer_start": 0}
        modules.append(("WeightedLayerPooling", config, {"layer_weights": weight}))
    mode = _MODES.get(encoder.pooling, "mean")
    flags = {f"pooling_mode_{flag}": mode == name for name, flag in _FLAGS.items()}
    modules.append(("Pooling", {"word_embedding_dimension": hidden, **flags}, {}))
    if encoder.pooling == "cls_pooler":
        modules.append(_dense(encoder.backbone.pooler.dense, "tanh"))
    if encoder.head.kind != "none" and not encoder.head.train_only:
        modules.append(_dense(encoder.head.layer[0], "tanh" if encoder.head.tanh else "none"))  # type: ignore[index]
    if encoder.normalize:
        modules.append(("Normalize", {}, {}))
    return modules


def _dense(linear: Any, activation: str) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    config = {"in_features": linear.in_features, "out_features": linear.out_features, "bias": True}
    weights = {"linear.weight": linear.weight.detach(), "linear.bias": linear.bias.detach()}
    return "Dense", {**config, "activation_function": _ACTIVATIONS[activation]}, weights


def _type(kind: str) -> str:
    return f"sentence_transformers.models.{kind}"


def _add(folder: Path, kind: str, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    place = f"{len(modules)}_{kind}"
    (folder / place).mkdir(exist_ok=True)
    if config:
        _write(folder / place / "config.json", config)
    if weights:
        save_file({k: v.cpu().contiguous() for k, v in weights.items()}, folder / place / "model.safetensors")
    modules.append({"idx": len(modules), "name": str(len(modules)), "path": place, "type": _type(kind)})
    _write(folder / "modules.json", modules)


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _update(path: Path, **values: Any) -> None:
    _write(path, {**json.loads(path.read_text(encoding="utf-8")), **values})


class ModelFolder:
    """Read access to a model's files, in a folder or on the hub."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.source = resolve_source(name, "model")

    def path(self, file: str) -> Path | None:
        """Where the file lies, or None."""
        if Path(self.source).is_dir():
            path = Path(self.source) / file
            return path if path.is_file() else None
        try:
            found = cached_file(self.source, file, _raise_exceptions_for_missing_entries=False)
        except OSError:
            return None  # the loading of the weights, which follows, says what is wrong
        return Path(found) if found else None

    def local(self) -> str:
        """The folder; raises ``InputError`` for a name on the hub, where a model of several folders cannot be read."""
        if not Path(self.source).is_dir():
            raise InputError(f"model={self.name} has two towers, which are read from a folder here. Download it first.")
        return self.source

    def json(self, file: str) -> Any:
        """The file's content, or None."""
        path = self.path(file)
        return json.loads(path.read_text(encoding="utf-8")) if path else None


def load_folder(name: str, pooling: str | None = None) -> tuple[Encoder, str]:
    """The encoder in a folder or on the hub, and how its pooling was known.

    ``pooling`` overrides what the folder records; a folder that records none is read with the mean.
    """
    folder = ModelFolder(name)
    found = folder.json(SETTINGS) or _from_modules(folder)
    known = "as the folder records" if found else "the folder records none: the mean is assumed, model.pooling=... changes it"
    values = found or _assumed(folder)
    if values.get("kind") == DualEncoder.kind:
        f, g = (load_folder(f"{folder.local()}/{name}", pooling)[0] for name in SIDES)
        return dual_encoder(f, g), known
    if pooling:
        values, known = {**values, "pooling": pooling}, "as model.pooling asks"
    backbone = load_pretrained(AutoModel, name, "model")
    images = values.get("kind", "text") == "image"
    encoder = build_encoder(backbone, None if images else load_pretrained(AutoTokenizer, name, "model"), values)
    weights = values.get("weights") or folder.path("head.safetensors")
    if encoder.head.kind != "none" and weights:
        encoder.head.load_state_dict({k.replace("linear.", "layer.0."): v for k, v in load_file(weights).items()})
    return encoder, known


def dual_encoder(f: Encoder, g: Encoder) -> DualEncoder:
    """Both encoders as one."""
    assert isinstance(f, TextEncoder) and isinstance(g, TextEncoder)
    return DualEncoder(f, g, f.tokenizer)


def build_encoder(backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, values: dict[str, Any]) -> Encoder:
    """An encoder of its parts and the ``settings`` of one."""
    head = Head(**{"kind": "none", "dim": None, "train_only": False, **values["head"]})
    if tokenizer is None:
        pixels = PixelFormat(**values["pixels"])
        return ImageEncoder(backbone, pixels, values["pooling"], head, values["normalize"], values["norm"], PLAIN)
    return TextEncoder(backbone, tokenizer, values["pooling"], head, values["normalize"], values["max_length"], PLAIN)


def _assumed(folder: ModelFolder) -> dict[str, Any]:
    """Of a folder that says nothing: images where it has a preprocessor of images and no vocabulary."""
    shared: dict[str, Any] = {"pooling": "mean", "head": {}, "normalize": False}
    found = folder.json(PREPROCESSOR)
    if found and "image_mean" in found and "vocab_size" not in (folder.json("config.json") or {}):
        pixels = parse_pixel_format(found, None)
        return {**shared, "kind": "image", "norm": "keep", "pixels": vars(pixels)}
    return {**shared, "max_length": None}


def _from_modules(folder: ModelFolder) -> dict[str, Any] | None:
    """The settings that sentence-transformers' files say, or None without such files."""
    modules = folder.json("modules.json")
    if modules is None:
        return None
    values: dict[str, Any] = {"pooling": None, "head": {}, "normalize": False}
    values["max_length"] = (folder.json("sentence_bert_config.json") or {}).get("max_seq_length")
    for module in modules[1:]:
        kind = module["type"].rsplit(".", 1)[-1]
        config = folder.json(f"{module['path']}/config.json") or {}
        if kind == "Pooling":
            values["pooling"] = _mode(config, folder.name)
        elif kind == "Dense" and not values["head"]:
            if config["activation_function"] not in _ACTIVATIONS.values() or not config.get("bias", True):
                raise InputError(
                    f"model={folder.name}: its Dense has {config['activation_function']}, bias {config.get('bias')}; "
                    f"tercet runs {' and '.join(_ACTIVATIONS.values())}, with bias."
                )
            tanh = config["activation_function"] == _ACTIVATIONS["tanh"]
            values["head"] = {"kind": "mlp" if tanh else "linear", "dim": config["out_features"], "train_only": False}
            values["weights"] = folder.path(f"{module['path']}/model.safetensors")
        elif kind == "Normalize":
            values["normalize"] = True
        else:
            raise InputError(f"model={folder.name}: its module {module['type']} is not one that tercet can run.")
    return values


def _mode(config: dict[str, Any], name: str) -> str:
    modes = config.get("pooling_mode")
    if modes is None:
        names = {flag: mode for mode, flag in _FLAGS.items()}
        set_ = [key.removeprefix("pooling_mode_") for key, on in config.items() if key.startswith("pooling_mode_") and on]
        modes = [names.get(flag, flag) for flag in set_]
    modes = [modes] if isinstance(modes, str) else list(modes)
    if len(modes) != 1 or modes[0] not in _OURS:
        raise InputError(f"model={name}: its pooling {modes} is not one of tercet's. Set model.pooling.")
    return _OURS[modes[0]]
