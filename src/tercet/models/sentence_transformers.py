"""Model folders of sentence-transformers, versions 2 to 6: what ``modules.json`` and the files beside it say of a text encoder.

Everything that a folder says is kept, with the same embeddings, or refused by its name.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tercet.errors import InputError, require
from tercet.models.engine.transformers_compat import find_file
from tercet.models.interop import SIMILARITIES
from tercet.models.pooling import NEEDS_ALL_LAYERS
from tercet.models.pretrained import MODULES, read_json, read_module_list, transformer_settings, write_json
from tercet.models.prompts import NAMES, Prompts

if TYPE_CHECKING:
    from tercet.models.text import TextEncoder

MODEL_SETTINGS = "config_sentence_transformers.json"
POOLINGS = {"cls": "cls", "mean": "mean", "max": "max", "lasttoken": "last", "weightedmean": "weighted_mean"}  # ours
_POOLING_MODES = {**{ours: mode for mode, ours in POOLINGS.items()}, "cls_pooler": "cls"}  # others average: "mean"
ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "SiLU", "Sigmoid")  # modules of torch.nn without arguments
_HEADS = {"Identity": "linear", "Tanh": "mlp"}  # the kind of ``Head`` for an activation
# Settings of a transformer with the values that change no embedding; ``max_seq_length`` and ``do_lower_case`` are kept.
_NO_EFFECT: dict[str, tuple[Any, ...]] = {
    "transformer_task": ("feature-extraction",), "module_output_name": ("token_embeddings",), "processing_kwargs": ({},),
    "query_length": (), "document_length": (), "query_expansion": (), "tokenizer_name_or_path": (), "model_args": ({},),
    "tokenizer_args": ({},), "config_args": ({},), "model_kwargs": ({},), "processor_kwargs": ({},), "config_kwargs": ({},),
}  # fmt: skip
_TRANSFORMER = {"max_seq_length", "do_lower_case", "modality_config", "unpad_inputs", "backend", *_NO_EFFECT}  # all settings
_POOLING = {"embedding_dimension", "word_embedding_dimension", "pooling_mode", "include_prompt"}  # and flags of modes
_POOLING |= {f"pooling_mode_{mode}" for mode in ("cls_token", "max_tokens", "mean_tokens", "mean_sqrt_len_tokens",
                                                 "weightedmean_tokens", "lasttoken")}  # fmt: skip
_LAYER = {"module_input_name", "module_output_name"}
_LAYERS = {
    "Normalize": _LAYER,
    "Dense": {*_LAYER, "in_features", "out_features", "bias", "activation_function", "use_residual"},
}
_Module = tuple[str, dict[str, Any], dict[str, Tensor]]  # kind, configuration, weights


def write_modules(encoder: "TextEncoder", folder: Path, dtype: torch.dtype) -> None:
    """Add to a model folder what sentence-transformers needs to give the same embeddings, or to refuse it."""
    if encoder.word_level or (encoder.normalize and encoder.num_outputs > 1):
        refuse_to_open(folder, encoder)
        return
    if encoder.pooling in NEEDS_ALL_LAYERS:
        write_json(folder / "config.json", {**read_json(str(folder), "config.json"), "output_hidden_states": True})
    lower = encoder.settings().get("lower_case", False)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": encoder.max_length, "do_lower_case": lower})
    modules = []
    for i, (kind, config, weights) in enumerate(_modules(encoder)):
        path = f"{i}_{kind}" if i else ""
        (folder / path).mkdir(exist_ok=True)
        if config:
            write_json(folder / path / "config.json", config)
        if weights:
            own = {name: x.to("cpu", dtype).contiguous() for name, x in weights.items()}
            save_file(own, folder / path / "model.safetensors")
        modules.append({"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"})
    write_json(folder / MODULES, modules)
    # Of a name that is missing, sentence-transformers takes none for queries and documents, and not the default prompt.
    names = {name: encoder.prompts.of_column(i).text for i, name in enumerate(NAMES)} if encoder.prompts.texts else {}
    last = (encoder.head.settings().get("layers") or [{}])[-1]
    write_json(folder / MODEL_SETTINGS, {
        "prompts": {**encoder.prompts.texts, **names}, "default_prompt_name": encoder.prompts.default,
        "similarity_fn_name": encoder.similarity_fn_name,
        "truncate_dim": last["dim"] if last.get("type") == "Truncate" else None,
    })  # fmt: skip


def refuse_to_open(folder: Path, encoder: Any) -> None:
    """Make sentence-transformers refuse the folder, by a module that it does not know: it would give other embeddings."""
    write_json(folder / MODULES, [{"idx": 0, "name": "0", "path": "", "type": f"tercet.models.{type(encoder).__name__}"}])


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
    prompt = {} if encoder.prompts.pooled else {"include_prompt": False}
    yield "Pooling", {"word_embedding_dimension": hidden, "pooling_mode": mode, **prompt}, {}
    if encoder.pooling == "cls_pooler":
        yield _dense(encoder.backbone.pooler.dense, "Tanh")  # type: ignore[union-attr]
    head: Any = encoder.head
    if "layers" in head.settings():
        for layer, module in zip(head.layers, head.layer, strict=True):
            if layer["type"] == "Dense":
                yield _dense(module[0], layer["activation"])
            elif layer["type"] == "Normalize":
                yield "Normalize", {}, {}
    elif head.layer is not None and not head.train_only:
        yield _dense(head.layer[0], "Tanh" if head.tanh else "Identity")
    if encoder.normalize:
        yield "Normalize", {}, {}


def _dense(linear: Any, activation: str) -> _Module:
    names = {name: "linear" if name == "Identity" else "activation" for name in ACTIVATIONS}
    config = {"in_features": linear.in_features, "out_features": linear.out_features, "bias": linear.bias is not None}
    weights = {f"linear.{name}": weight.detach() for name, weight in linear.named_parameters()}
    return "Dense", {**config, "activation_function": f"torch.nn.modules.{names[activation]}.{activation}"}, weights


def read_modules(source: str, name: str, chosen: str | None = None) -> dict[str, Any] | None:
    """The settings in the files of sentence-transformers; None without such files. ``chosen`` is a pooling in place of theirs.

    ``weights`` of the settings maps the prefix of a layer's weights in the head to their file.
    """
    modules = read_module_list(source)
    if modules is None:
        return None
    what = f"`path_or_id`={name}"
    layers: list[dict[str, Any]] = []
    files: list[Path | None] = []
    pooling: dict[str, Any] | None = None
    for i, module in enumerate(modules):
        kind = module["type"].rsplit(".", 1)[-1]
        config = read_json(source, str(Path(module["path"]) / "config.json")) or {} if i else {}
        place = kind == "Transformer" if not i else (kind == "Pooling") == (pooling is None)
        known = module["type"].startswith("sentence_transformers.") and kind in ("Transformer", "Pooling", "Dense", "Normalize")
        require(known and place, f"{what}: its module {i}, {module['type']}, is not one that tercet can run at this place.")
        if kind == "Pooling":
            pooling = config
        elif i:
            layers.append(_layer(kind, config, what))
            files.append(_weights_file(source, module["path"], what) if kind == "Dense" else None)
    if pooling is None:
        require(chosen, f"{what}: it has no module that pools. Choose one by `pooling`, as `pooling`=mean.")
        pooling = {}
    settings = {"pooling": chosen or _pooling_of_module(pooling, bool(layers), what), **_transformer(source, what)}
    settings |= _model(source, pooling, layers, what)
    return {**settings, **_head(layers, files)}


def _head(layers: list[dict[str, Any]], files: list[Path | None]) -> dict[str, Any]:
    """The head, whether its output is normalized, and the files of its weights."""
    normalize = bool(layers) and layers[-1]["type"] == "Normalize"
    layers = layers[:-1] if normalize else layers
    first = layers[0] if layers else {}
    simple = len(layers) == 1 and first["type"] == "Dense" and first["bias"] and first["activation"] in _HEADS
    head = {"kind": _HEADS[first["activation"]], "dim": first["dim"]} if simple else {"layers": layers} if layers else {}
    weights = {"layer.0." if simple else f"layer.{i}.0.": file for i, file in enumerate(files) if file}
    return {"head": head, "normalize": normalize, "weights": weights}


def _check_known(config: Mapping[str, Any], known: set[str], what: str, part: str) -> None:
    """Raise ``InputError`` for settings that no version of sentence-transformers so far has: they may change embeddings."""
    unknown = {key: value for key, value in config.items() if key not in known}
    require(not unknown, f"{what}: its {part} has the settings {unknown}, which tercet does not know.")


def _layer(kind: str, config: Mapping[str, Any], what: str) -> dict[str, Any]:
    own, names = "sentence_embedding", ("module_input_name", "module_output_name")
    others = {key: value for key in names if (value := config.get(key, own)) not in (own, None)}
    others |= {"use_residual": True} if config.get("use_residual") else {}
    require(not others, f"{what}: its module {kind} has {others}, which tercet cannot run.")
    _check_known(config, _LAYERS[kind], what, f"module {kind}")
    if kind == "Normalize":
        return {"type": kind}
    path = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    activation = path.rsplit(".", 1)[-1]
    known = path.startswith("torch.nn.modules.") and activation in ACTIVATIONS
    require(known, f"{what}: its Dense has the activation {path}; tercet runs {', '.join(ACTIVATIONS)}.")
    return {"type": kind, "dim": config["out_features"], "bias": config.get("bias", True), "activation": activation}


def _weights_file(source: str, path: str, what: str) -> Path:
    for file in ("model.safetensors", "pytorch_model.bin"):
        if found := find_file(source, str(Path(path) / file)):
            return found
    raise InputError(f"{what}: {path} has no weights (model.safetensors or pytorch_model.bin).")


def _pooling_of_module(config: Mapping[str, Any], has_layers: bool, what: str) -> str:
    modes = config.get("pooling_mode")
    if modes is None:
        flags = [key.removeprefix("pooling_mode_") for key, on in config.items() if key.startswith("pooling_mode_") and on]
        modes = [re.sub("_tokens?$", "", flag) for flag in flags] or ["mean"]  # mean_tokens, cls_token, lasttoken
    modes = [modes] if isinstance(modes, str) else list(modes)
    known = len(modes) == 1 and modes[0] in POOLINGS
    fits = not has_layers or len(modes) == 1  # several are side by side, and wider
    other = "Another can be chosen by `pooling`, and gives other embeddings" if fits else "The layers behind it take no other"
    require(known, f"{what}: its pooling is {' and '.join(modes)}; tercet runs one of {', '.join(POOLINGS)}. {other}.")
    _check_known(config, _POOLING, what, "module Pooling")
    return POOLINGS[modes[0]]


def _transformer(source: str, what: str) -> dict[str, Any]:
    """How texts are tokenized."""
    found = transformer_settings(source)
    modalities = found.get("modality_config") or {"text": {}}
    require("text" in modalities, f"{what}: it reads {', '.join(modalities)}; tercet reads texts from such folders.")
    text = modalities["text"]
    changed = {key: value for key in _NO_EFFECT if (value := found.get(key)) not in (None, *_NO_EFFECT[key])}
    output = text.get("method_output_name", "last_hidden_state")
    if (text.get("method", "forward"), output) != ("forward", "last_hidden_state"):
        changed["modality_config"] = text
    require(not changed, f"{what}: its transformer has {changed}, which tercet cannot run.")
    _check_known(found, _TRANSFORMER, what, "transformer")
    lower = {"lower_case": True} if found.get("do_lower_case") else {}
    return {"max_length": found.get("max_seq_length"), **lower}


def default_prompt(source: str) -> str:
    """The prompt that a folder or hub id puts before each text; empty where it has none."""
    found = (read_json(source, MODEL_SETTINGS) if source else None) or {}
    prompts, name = found.get("prompts"), found.get("default_prompt_name")
    prompt = prompts.get(name) if isinstance(prompts, dict) and isinstance(name, str) else None
    return prompt if isinstance(prompt, str) else ""


def _model(source: str, pooling: Mapping[str, Any], layers: list[dict[str, Any]], what: str) -> dict[str, Any]:
    """The prompts and the similarity function; a truncation is added to ``layers``."""
    found = read_json(source, MODEL_SETTINGS) or {}
    kind = found.get("model_type", "SentenceTransformer")
    require(kind == "SentenceTransformer", f"{what}: it is a {kind}, which gives no embedding of a text.")
    if dim := found.get("truncate_dim"):
        layers.append({"type": "Truncate", "dim": dim})
    texts = {key: text or "" for key, text in (found.get("prompts") or {}).items()}
    if texts:  # as sentence-transformers does; "passage" or "corpus" may stand for "document"
        texts = {"query": "", **({} if {"passage", "corpus"} & texts.keys() else {"document": ""}), **texts}
    default = found.get("default_prompt_name")
    prompts = Prompts(texts, default if default in texts else None, pooling.get("include_prompt", True))
    settings: dict[str, Any] = {"prompts": prompts.settings()} if texts else {}
    similarity = found.get("similarity_fn_name") or "cosine"
    known = similarity in SIMILARITIES
    require(known, f"{what}: its similarity function is {similarity}; tercet knows {', '.join(SIMILARITIES)}.")
    return {**settings, "similarity": similarity} if similarity != "cosine" else settings
