"""Export of an encoder as one ONNX file, which needs no torch.

Texts: ``input_ids (n, L)``, ``attention_mask (n, L)`` to ``z (n, D)``. Images: 8-bit ``pixels (n, C, S, S)`` to ``z (n, D)``.
"""

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tercet.errors import InputError, check_choice, require
from tercet.images import PixelFormat
from tercet.models.encoder import Encoder
from tercet.models.engine.chunking import Execution
from tercet.models.engine.packing import KEY_VALUE
from tercet.models.image import ImageEncoder, ImageInputs
from tercet.models.pretrained import (
    add_lowercase,
    drop_foreign_templates,
    load_pretrained,
    read_json,
    refuse_remote_code,
    write_json,
)
from tercet.models.prompts import Prompts
from tercet.models.text import tokenize
from tercet.paths import atomic_folder
from tercet.types import Item

FILE = "model.onnx"
SETTINGS = "onnx.json"


def export_onnx(encoder: Encoder, folder: Path, precision: str = "float32") -> None:
    """Write ``model.onnx``, how items are prepared for it, and for texts the tokenizer.

    ``int8``: linear layers in 8 bits, with a scale for each output column of the weights and one for the activations of a
    chunk, found at run time. The values of attention stay in float32: rounding them costs most (docs/lab/benchmarks.md), and
    so do convolutions. A CPU without VNNI adds two products in 16 bits, which may saturate.
    """
    check_choice("precision", precision, ("float32", "int8"))
    parts: list[Any] = list(encoder.parts())
    one = len(parts) == 1 and not getattr(parts[0], "word_level", False)
    require(one, "export is for texts through one transformer, and for images; this model is of another kind.")
    part = parts[0]
    name, reason = type(part.backbone).__name__, "" if part.tokenizer is None else part.runner.cannot_pad
    require(not reason, f"export is for padded rows, which {name} cannot read: {reason}.")
    onnx, quantization = _import("onnx"), _import("onnxruntime.quantization")
    with atomic_folder(folder) as made:
        target = made / FILE
        _write_float32(part, target)
        if precision == "int8":
            full = target.rename(made / "float32.onnx")
            excluded = [node.name for node in onnx.load(full).graph.node if _makes_values(node)]
            kind = quantization.QuantType.QInt8
            options = {"per_channel": True, "weight_type": kind, "op_types_to_quantize": ["MatMul", "Gemm"]}
            with _silence_exporter():
                quantization.quantize_dynamic(full, target, nodes_to_exclude=excluded, **options)
            full.unlink()
        # "sides" is num_outputs in the files of all versions:
        saved = {"precision": precision, "dim": part.dim, "sides": part.num_outputs, **part.settings()}
        if part.tokenizer is not None:
            part.tokenizer.save_pretrained(made)
        write_json(made / SETTINGS, saved)


def open_exported(folder: Path) -> "ONNXEncoder":
    """The exported encoder of a folder, of texts or images."""
    saved = read_json(str(folder), SETTINGS)
    return (ONNXImageEncoder if saved.get("kind") == ImageEncoder.kind else ONNXEncoder)(folder, saved)


class ONNXEncoder(Encoder):
    """An exported encoder: ``TokenBatch -> (N, D)`` by ONNX Runtime on the CPU. It has no weights and cannot be trained."""

    kind = "text"
    device = torch.device("cpu")
    dim, num_outputs = 0, 1  # replaced by those that are saved

    def __init__(self, folder: Path, saved: dict[str, Any]) -> None:
        super().__init__(Execution(layout="sorted", dropout="torch"))
        onnxruntime = _import("onnxruntime")
        self.saved, self.dim, self.num_outputs = saved, int(saved["dim"]), int(saved["sides"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(str(folder / FILE), options, providers=["CPUExecutionProvider"])
        self._read_inputs(folder)

    def _read_inputs(self, folder: Path) -> None:
        self.max_length, self.prompts = int(self.saved["max_length"]), Prompts(**self.saved.get("prompts", {}))
        refuse_remote_code(str(folder), "", f"`path_or_id`={folder}", has_switch=False)
        self.tokenizer: PreTrainedTokenizerBase = load_pretrained(AutoTokenizer, str(folder), "path_or_id")
        drop_foreign_templates(self.tokenizer)
        if self.saved.get("lower_case"):
            add_lowercase(self.tokenizer)

    def run(self, inputs: Any, execution: Execution) -> Tensor:
        """``TokenBatch -> (N, D)``."""
        return execution.run(self.embed, inputs)

    def embed(self, rows: Any) -> Tensor:
        """``n`` rows to ``(n, D)`` in one pass."""
        ids, mask, _ = rows.pad(int(self.tokenizer.pad_token_id or 0))
        return self._session_run(input_ids=ids, attention_mask=mask)

    def _session_run(self, **inputs: Tensor) -> Tensor:
        (z,) = self.session.run(None, {name: x.numpy() for name, x in inputs.items()})
        return torch.from_numpy(z)

    def prepare(self, items: Sequence[Item]) -> Any:
        """Token ids with special tokens and the prompt, cut at ``max_length``."""
        return tokenize(self.tokenizer, self.prompts.add(items), self.max_length)

    def settings(self) -> dict[str, Any]:
        """The content of ``onnx.json``."""
        return dict(self.saved)


class ONNXImageEncoder(ImageInputs, ONNXEncoder):
    """An exported encoder of images: ``Images -> (N, D)``."""

    kind = "image"

    def _read_inputs(self, folder: Path) -> None:
        self.pixels = PixelFormat(**self.saved["pixels"])

    def embed(self, pixels: Tensor) -> Tensor:
        """``pixels (n, C, S, S)``, 8-bit, to ``(n, D)`` in one pass."""
        return self._session_run(pixels=pixels)


def _makes_values(node: Any) -> bool:
    """Whether a node belongs to a layer that makes the values of attention."""
    scopes = next((pair.value for pair in node.metadata_props if pair.key.endswith("name_scopes")), "")
    return any(f".{names[1]}'" in scopes for names in KEY_VALUE)


class _PaddedEncoder(nn.Module):
    """The encoder as a function of padded rows, by operations that ONNX has."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder).cpu().float().eval()
        self.encoder.backbone.set_attn_implementation("eager")

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        arguments = {"input_ids": input_ids, "attention_mask": attention_mask, **self.encoder.runner.type_arguments(input_ids)}
        output = self.encoder.backbone(**arguments, output_hidden_states=True, return_dict=True)
        return self.encoder.pool(output, attention_mask)  # type: ignore[no-any-return]


class _PixelEncoder(_PaddedEncoder):
    """The encoder as a function of 8-bit pixels."""

    def forward(self, pixels: Tensor) -> Tensor:  # type: ignore[override]
        return self.encoder.embed(pixels)  # type: ignore[no-any-return]


def _write_float32(encoder: Any, path: Path) -> None:
    dynamic = torch.export.Dim.DYNAMIC
    module: nn.Module
    if encoder.tokenizer is None:
        pixels = encoder.pixels
        images = torch.zeros(3, pixels.channels, pixels.size, pixels.size, dtype=torch.uint8)
        module, inputs, shape = _PixelEncoder(encoder), {"pixels": images}, {0: dynamic}
    else:
        ids = torch.full((3, 7), int(encoder.tokenizer.unk_token_id or 0))
        mask = torch.ones_like(ids)
        mask[0, 5:] = 0
        module, inputs, shape = _PaddedEncoder(encoder), {"input_ids": ids, "attention_mask": mask}, {0: dynamic, 1: dynamic}
    shapes = dict.fromkeys(inputs, shape)
    options: Any = {"input_names": [*inputs], "output_names": ["z"], "dynamic_shapes": shapes, "dynamo": True}
    with _silence_exporter(), torch.no_grad():
        program: Any = torch.onnx.export(module, tuple(inputs.values()), **options)
        program.save(path)


def _import(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise InputError(f"{error.name} is not installed: pip install 'tercet[export]'.") from error


@contextlib.contextmanager
def _silence_exporter() -> Iterator[None]:
    """The exporter prints its steps, and warnings for its own developers."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
