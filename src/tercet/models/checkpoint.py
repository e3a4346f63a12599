"""The encoder inside a training checkpoint: self-contained, read with ``weights_only=True``."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer

from tercet.errors import InputError
from tercet.models.dual import DualEncoder
from tercet.models.folder import SIDES, build_encoder, dual_encoder
from tercet.models.text import Encoder, TextEncoder

KEY = "tercet_encoder"


def encoder_spec(encoder: Encoder) -> dict[str, Any]:
    """All that is needed beside the weights to build the encoder again, as plain values."""
    if isinstance(encoder, DualEncoder):
        return {"kind": encoder.kind, **{name: encoder_spec(getattr(encoder, name)) for name in SIDES}}
    files: dict[str, str] = {}
    if isinstance(encoder, TextEncoder):
        with tempfile.TemporaryDirectory() as folder:
            encoder.tokenizer.save_pretrained(folder)
            kept = (p for p in Path(folder).iterdir() if p.suffix in (".json", ".txt"))
            files = {p.name: p.read_text(encoding="utf-8") for p in kept}
    return {"config": encoder.backbone.config.to_json_string(use_diff=False), "tokenizer": files, **encoder.settings()}


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint's content; no code in it is ever run."""
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


def load_encoder(path: str | Path) -> Encoder:
    """Build the encoder that a checkpoint describes and give it the checkpoint's weights."""
    content = read_checkpoint(path)
    encoder = encoder_from_spec(content[KEY])
    prefix = "encoder."
    weights = {k.removeprefix(prefix): v for k, v in content["state_dict"].items() if k.startswith(prefix)}
    encoder.load_state_dict(weights)
    return encoder


def encoder_from_spec(spec: dict[str, Any]) -> Encoder:
    """The encoder that ``describe`` tells of, with weights of no meaning."""
    if spec["kind"] == DualEncoder.kind:
        return dual_encoder(*(encoder_from_spec(spec[name]) for name in SIDES))
    with tempfile.TemporaryDirectory() as folder:
        for name, text in (("config.json", spec["config"]), *spec["tokenizer"].items()):
            (Path(folder) / name).write_text(text, encoding="utf-8")
        backbone = AutoModel.from_config(AutoConfig.from_pretrained(folder))
        tokenizer = AutoTokenizer.from_pretrained(folder) if spec["tokenizer"] else None
    return build_encoder(backbone, tokenizer, spec)
