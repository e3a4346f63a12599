"""Backbones and tokenizers of ``transformers``: from a hub id, a folder, an installed package, or at random."""

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers import logging as transformers_logging
from transformers.utils.hub import cached_file

from tercet.errors import InputError
from tercet.images import PixelFormat
from tercet.paths import locate

PACKAGE = "pkg://"
PREPROCESSOR = "preprocessor_config.json"
_DROPOUTS = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "dropout",
    "attention_dropout",
    "embedding_dropout",
    "mlp_dropout",
    "hidden_dropout",
)


def resolve_source(name: str, key: str) -> str:
    """What ``from_pretrained`` understands: a folder's path, or the hub id unchanged.

    ``pkg://package/folder`` is a folder that an installed Python package carries.
    """
    if name.startswith(PACKAGE):
        package, _, folder = name.removeprefix(PACKAGE).partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise InputError(f"{key}={name}: the package {package} is not installed. pip install {package.replace('_', '-')}")
        return str(Path(spec.submodule_search_locations[0]) / folder)
    path = locate(name)
    if path.is_file():
        raise InputError(f"{key}={name} is a file; a model's folder or a hub id is needed.")
    return str(path) if path.is_dir() else name


def load_pretrained(loader: Any, name: str, key: str, **options: Any) -> Any:
    """``loader.from_pretrained`` of what ``find`` finds; ``InputError`` naming ``key`` where it cannot be had."""
    source = resolve_source(name, key)
    level = transformers_logging.get_verbosity()
    # What the loader calls unexpected or missing (a pooler, an LM head) is decided here, so its table would mislead.
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        return loader.from_pretrained(source, **options)
    except Exception as error:
        if Path(source).is_dir():
            raise InputError(f"{key}={name}: the folder {source} could not be read as a model: {first_line(error)}") from error
        raise InputError(
            f"{key}={name}: no such folder here, and the hub did not give it ({first_line(error)}). "
            f"Set {key} to a model's folder, a hub id that can be reached, or pkg://package/folder."
        ) from error
    finally:
        transformers_logging.set_verbosity(level)


def first_line(error: Exception) -> str:
    """What an error says first."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _set_dropout(config: Any, dropout: float | None) -> None:
    if dropout is None:
        return
    if not 0 <= dropout < 1:
        raise InputError(f"model.backbone.dropout={dropout}: a rate from 0 to below 1, or null for the model's own.")
    for name in _DROPOUTS:
        if hasattr(config, name):
            setattr(config, name, dropout)


def load_backbone(name: str, dropout: float | None) -> PreTrainedModel:
    """The encoder of that name with its weights; ``dropout`` replaces every rate of its configuration, null keeps them."""
    config = load_pretrained(AutoConfig, name, "model.backbone.name")
    _set_dropout(config, dropout)
    model: PreTrainedModel = load_pretrained(AutoModel, name, "model.backbone.name", config=config)
    return model


def random_backbone(config: Mapping[str, Any], dropout: float | None) -> PreTrainedModel:
    """An encoder with weights drawn at random; ``config`` holds ``model_type`` and what that configuration takes."""
    values = dict(config)
    kind = values.pop("model_type", None)
    try:
        built = AutoConfig.for_model(kind, **values)
    except ValueError as error:
        raise InputError(
            f"model.backbone.config.model_type={kind}: transformers knows no such model ({first_line(error)[:80]})."
        ) from error
    _set_dropout(built, dropout)
    model: PreTrainedModel = AutoModel.from_config(built)
    return model


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of that name."""
    loaded: PreTrainedTokenizerBase = load_pretrained(AutoTokenizer, name, "model.tokenizer.name")
    return loaded


def load_pixel_format(name: str, size: int | None) -> PixelFormat:
    """How the pretrained backbone of that name wants its images; ``size`` replaces its own."""
    source = resolve_source(name, "model.backbone.name")
    try:
        file = cached_file(source, PREPROCESSOR)
        found = json.loads(Path(file).read_text(encoding="utf-8")) if file else None
    except OSError as error:
        raise InputError(
            f"model.backbone.name={name} has no {PREPROCESSOR} ({first_line(error)}). Say how its images are made: "
            "model.pixels._target_=tercet.images.PixelFormat with size, channels, mean and std."
        ) from error
    assert found is not None
    return parse_pixel_format(found, size)


def parse_pixel_format(found: dict[str, Any], size: int | None) -> PixelFormat:
    """``preprocessor_config.json`` as ``Pixels``; a crop's side goes before that of the whole."""
    sides = found.get("crop_size") if found.get("do_center_crop") else None
    sides = sides or found.get("size") or 224
    side = sides if isinstance(sides, int) else sides.get("shortest_edge") or sides.get("height")
    mean, std = found.get("image_mean") or [0.5] * 3, found.get("image_std") or [0.5] * 3
    if not found.get("do_normalize", True):
        mean, std = [0.0] * len(mean), [1.0] * len(std)
    return PixelFormat(size or int(side), len(mean), mean, std)
