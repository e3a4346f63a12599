"""Saving and loading a model as a folder: weights, tokenizer, pooling and normalization settings.

The layout is that of transformers (``config.json``, ``model.safetensors``) and of sentence-transformers
(``modules.json``), which both open it; sentence-transformers gives the same embeddings. ``tercet.json`` adds what neither
has (a head for training only).
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tercet.errors import InputError
from tercet.images import PixelFormat
from tercet.models.dual import DualEncoder
from tercet.models.encoder import Encoder
from tercet.models.engine.transformers_compat import find_file
from tercet.models.image import ImageEncoder
from tercet.models.pooling import NEEDS_ALL_LAYERS, Head
from tercet.models.pretrained import PREPROCESSOR, load_pretrained, parse_pixel_format, resolve_source
from tercet.models.text import TextEncoder
from tercet.models.words import WordModel

SETTINGS = "tercet.json"
VERSION = 1  # of tercet.json and of the encoder in a checkpoint; files without a version are of version 1
PARTS = ("f", "g")  # of a DualEncoder
_POOLING_MODES = {"cls": "cls", "cls_pooler": "cls", "max": "max", "last": "lasttoken"}  # others average: "mean"
_MODE_FLAGS = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens", "lasttoken": "lasttoken"}
_MODE_POOLINGS = {"cls": "cls", "mean": "mean", "max": "max", "lasttoken": "last"}
_ACTIVATIONS = {"none": "torch.nn.modules.linear.Identity", "tanh": "torch.nn.modules.activation.Tanh"}


def save_model(encoder: Encoder, path: str | Path) -> None:
    """Write the encoder's folder."""
    folder = Path(path)
    if isinstance(encoder, DualEncoder):
        for name in PARTS:
            save_model(getattr(encoder, name), folder / name)
    elif isinstance(encoder, TextEncoder | ImageEncoder):
        encoder.backbone.save_pretrained(folder)
        if encoder.head.kind != "none":
            save_file({k: v.contiguous() for k, v in encoder.head.state_dict().items()}, folder / "head.safetensors")
        if isinstance(encoder, TextEncoder):
            _save_text(encoder, folder)
        else:
            _write(folder / PREPROCESSOR, _preprocessor(encoder.pixels))
    else:
        raise InputError("An exported model cannot be saved as a model folder: copy its own folder instead.")
    _write(folder / SETTINGS, {"version": VERSION, **encoder.settings()})


def _preprocessor(pixels: PixelFormat) -> dict[str, Any]:
    """The pixel format as transformers writes it."""
    return {
        "image_processor_type": "ViTImageProcessor", "do_rescale": True, "rescale_factor": 1 / 255, "do_resize": True,
        "size": {"shortest_edge": pixels.size}, "do_center_crop": True,
        "crop_size": {"height": pixels.size, "width": pixels.size}, "do_normalize": True, "resample": 3,
        "image_mean": list(pixels.mean), "image_std": list(pixels.std),
    }  # fmt: skip


def _save_text(encoder: TextEncoder, folder: Path) -> None:
    encoder.tokenizer.save_pretrained(folder)
    if isinstance(encoder.backbone, WordModel) or (encoder.normalize and encoder.num_outputs > 1):
        return  # sentence-transformers has no module that would give the same embeddings
    if encoder.pooling in NEEDS_ALL_LAYERS:
        config = folder / "config.json"
        _write(config, {**json.loads(config.read_text(encoding="utf-8")), "output_hidden_states": True})
    _write(folder / "sentence_bert_config.json", {"max_seq_length": encoder.max_length, "do_lower_case": False})
    modules = [{"idx": 0, "name": "0", "path": "", "type": _module_type("Transformer")}]
    for i, (kind, settings, weights) in enumerate(_modules(encoder), start=1):
        path = f"{i}_{kind}"
        (folder / path).mkdir(exist_ok=True)
        if settings:
            _write(folder / path / "config.json", settings)
        if weights:
            save_file({k: v.cpu().contiguous() for k, v in weights.items()}, folder / path / "model.safetensors")
        modules.append({"idx": i, "name": str(i), "path": path, "type": _module_type(kind)})
    _write(folder / "modules.json", modules)


def _modules(encoder: TextEncoder) -> list[tuple[str, dict[str, Any], dict[str, Tensor]]]:
    """The modules of sentence-transformers that follow the transformer: kind, configuration, weights."""
    hidden = encoder.backbone.config.hidden_size
    layers = encoder.backbone.config.num_hidden_layers
    modules: list[tuple[str, dict[str, Any], dict[str, Tensor]]] = []
    if encoder.pooling in NEEDS_ALL_LAYERS:
        chosen = {"first_last": 1, "static_last": 0, "top_two": layers - 1}[encoder.pooling]
        weight = torch.zeros(layers + 1)
        weight[[chosen, layers]] = 1.0
        config = {"word_embedding_dimension": hidden, "num_hidden_layers": layers, "layer_start": 0}
        modules.append(("WeightedLayerPooling", config, {"layer_weights": weight}))
    mode = _POOLING_MODES.get(encoder.pooling, "mean")
    flags = {f"pooling_mode_{flag}": mode == name for name, flag in _MODE_FLAGS.items()}
    modules.append(("Pooling", {"word_embedding_dimension": hidden, **flags}, {}))
    if encoder.pooling == "cls_pooler":
        modules.append(_dense(encoder.backbone.pooler.dense, "tanh"))  # type: ignore[union-attr]
    if encoder.head.kind != "none" and not encoder.head.train_only:
        modules.append(_dense(encoder.head.layer[0], "tanh" if encoder.head.tanh else "none"))  # type: ignore[index]
    if encoder.normalize:
        modules.append(("Normalize", {}, {}))
    return modules


def _dense(linear: Any, activation: str) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    config = {"in_features": linear.in_features, "out_features": linear.out_features, "bias": True}
    weights = {"linear.weight": linear.weight.detach(), "linear.bias": linear.bias.detach()}
    return "Dense", {**config, "activation_function": _ACTIVATIONS[activation]}, weights


def _module_type(kind: str) -> str:
    return f"sentence_transformers.models.{kind}"


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


class ModelFolder:
    """Read access to a model's files, in a folder or on the hub."""

    def __init__(self, path_or_id: str) -> None:
        self.name = path_or_id
        self.source = resolve_source(path_or_id, "path_or_id")

    def path(self, file: str) -> Path | None:
        """The path of a file, or None."""
        if Path(self.source).is_dir():
            path = Path(self.source) / file
            return path if path.is_file() else None
        try:
            return find_file(self.source, file)
        except OSError:
            return None  # loading the weights, which follows, explains what is wrong

    def local(self) -> str:
        """The folder's path; ``InputError`` for a hub id: a model of two encoders is read from a folder."""
        if not Path(self.source).is_dir():
            raise InputError(f"`path_or_id`={self.name} has two encoders, which are read from a folder. Download it first.")
        return self.source

    def json(self, file: str) -> Any:
        """The content of a JSON file, or None."""
        path = self.path(file)
        return json.loads(path.read_text(encoding="utf-8")) if path else None


def load_folder(path_or_id: str, pooling: str | None = None) -> tuple[Encoder, str]:
    """The encoder of a folder or hub id, and a note on where its pooling comes from.

    ``pooling`` overrides what the folder records; a folder that records none is read with the mean.
    """
    folder = ModelFolder(path_or_id)
    settings = folder.json(SETTINGS) or _settings_of_modules(folder)
    note = "as the folder records" if settings else "the folder records none: the mean is assumed, another can be chosen"
    settings = settings or _default_settings(folder)
    check_version(settings, f"`path_or_id`={path_or_id}")
    if settings.get("kind") == DualEncoder.kind:
        f, g = (load_folder(f"{folder.local()}/{name}", pooling)[0] for name in PARTS)
        return dual_encoder(f, g), note
    if pooling:
        settings, note = {**settings, "pooling": pooling}, "as chosen"
    backbone = load_pretrained(AutoModel, path_or_id, "path_or_id")
    is_text = settings.get("kind", TextEncoder.kind) == TextEncoder.kind
    tokenizer = load_pretrained(AutoTokenizer, path_or_id, "path_or_id") if is_text else None
    encoder = build_encoder(backbone, tokenizer, settings)
    weights = settings.get("weights") or folder.path("head.safetensors")
    if encoder.head.kind != "none" and weights:
        encoder.head.load_state_dict({k.replace("linear.", "layer.0."): v for k, v in load_file(weights).items()})
    return encoder, note


def check_version(settings: dict[str, Any], what: str) -> None:
    """Raise ``InputError`` for settings that a later version of this library has written."""
    if settings.get("version", 1) > VERSION:
        raise InputError(f"{what} was written by a later version of tercet (format {settings['version']}). Upgrade tercet.")


def dual_encoder(f: Encoder, g: Encoder) -> DualEncoder:
    """Both encoders as one."""
    assert isinstance(f, TextEncoder) and isinstance(g, TextEncoder)
    return DualEncoder(f, g)


def build_encoder(
    backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, settings: dict[str, Any]
) -> TextEncoder | ImageEncoder:
    """An encoder from its parts and the ``settings`` of one; an image encoder if there is no tokenizer."""
    head = Head(**settings["head"])
    shared = {name: settings[name] for name in ("pooling", "normalize")}
    if tokenizer is None:
        return ImageEncoder(backbone, PixelFormat(**settings["pixels"]), head=head, norm=settings["norm"], **shared)
    return TextEncoder(backbone, tokenizer, head=head, max_length=settings["max_length"], **shared)


def _default_settings(folder: ModelFolder) -> dict[str, Any]:
    """For a folder without settings: images if it has an image preprocessor and no vocabulary."""
    shared: dict[str, Any] = {"pooling": "mean", "head": {}, "normalize": False}
    found = folder.json(PREPROCESSOR)
    if found and "image_mean" in found and "vocab_size" not in (folder.json("config.json") or {}):
        return {**shared, "kind": ImageEncoder.kind, "norm": "keep", "pixels": vars(parse_pixel_format(found))}
    return {**shared, "max_length": None}


def _settings_of_modules(folder: ModelFolder) -> dict[str, Any] | None:
    """The settings in the files of sentence-transformers; None without such files."""
    modules = folder.json("modules.json")
    if modules is None:
        return None
    settings: dict[str, Any] = {"pooling": None, "head": {}, "normalize": False}
    settings["max_length"] = (folder.json("sentence_bert_config.json") or {}).get("max_seq_length")
    for module in modules[1:]:
        kind = module["type"].rsplit(".", 1)[-1]
        config = folder.json(f"{module['path']}/config.json") or {}
        if kind == "Pooling":
            settings["pooling"] = _pooling_of_module(config, folder.name)
        elif kind == "Dense" and not settings["head"]:
            activation = config["activation_function"]
            if activation not in _ACTIVATIONS.values() or not config.get("bias", True):
                raise InputError(
                    f"`path_or_id`={folder.name}: its Dense has {activation}, bias {config.get('bias')}; "
                    f"tercet runs {' and '.join(_ACTIVATIONS.values())}, with bias."
                )
            kind = "mlp" if activation == _ACTIVATIONS["tanh"] else "linear"
            settings["head"] = {"kind": kind, "dim": config["out_features"], "train_only": False}
            settings["weights"] = folder.path(f"{module['path']}/model.safetensors")
        elif kind == "Normalize":
            settings["normalize"] = True
        else:
            raise InputError(f"`path_or_id`={folder.name}: its module {module['type']} is not one that tercet can run.")
    return settings


def _pooling_of_module(config: dict[str, Any], name: str) -> str:
    modes = config.get("pooling_mode")
    if modes is None:
        names = {flag: mode for mode, flag in _MODE_FLAGS.items()}
        active = [key.removeprefix("pooling_mode_") for key, on in config.items() if key.startswith("pooling_mode_") and on]
        modes = [names.get(flag, flag) for flag in active]
    modes = [modes] if isinstance(modes, str) else list(modes)
    if len(modes) != 1 or modes[0] not in _MODE_POOLINGS:
        raise InputError(f"`path_or_id`={name}: its pooling {modes} is not one of tercet's. Set `pooling`.")
    return _MODE_POOLINGS[modes[0]]
