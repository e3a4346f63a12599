"""Export of an encoder as one ONNX file: ``input_ids (n, L)``, ``attention_mask (n, L)`` to ``z (n, D)``; needs no torch."""

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
from tercet.models.encoder import Encoder
from tercet.models.engine.chunking import Execution
from tercet.models.engine.packing import KEY_VALUE
from tercet.models.pretrained import read_json, write_json
from tercet.models.text import TextEncoder, tokenize
from tercet.types import Item, TokenBatch

FILE = "model.onnx"
SETTINGS = "onnx.json"


def export_onnx(encoder: Encoder, folder: Path, precision: str = "float32") -> None:
    """Write ``model.onnx``, the tokenizer and how texts are cut.

    ``int8``: linear layers in 8 bits, with a scale for each output column of the weights and one for the activations of a
    chunk, found at run time. The values of attention stay in float32: rounding them costs most (docs/lab/benchmarks.md). A CPU
    without VNNI adds two products in 16 bits, which may saturate.
    """
    check_choice("precision", precision, ("float32", "int8"))
    parts = encoder.text_parts()
    one = len(parts) == 1 and not parts[0].word_level
    require(one, "export is for texts through one transformer; this model is of another kind.")
    part, target = parts[0], folder / FILE
    name, reason = type(part.backbone).__name__, part.runner.cannot_pad
    require(not reason, f"export is for padded rows, which {name} cannot read: {reason}.")
    folder.mkdir(parents=True, exist_ok=True)
    onnx, quantization = _import("onnx"), _import("onnxruntime.quantization")
    _write_float32(part, target)
    if precision == "int8":
        full = target.rename(folder / "float32.onnx")
        excluded = [node.name for node in onnx.load(full).graph.node if _makes_values(node)]
        kind = quantization.QuantType.QInt8
        options = {"per_channel": True, "weight_type": kind, "op_types_to_quantize": ["MatMul", "Gemm"]}
        with _silence_exporter():
            quantization.quantize_dynamic(full, target, nodes_to_exclude=excluded, **options)
        full.unlink()
    part.tokenizer.save_pretrained(folder)  # "sides" is num_outputs in the files of all versions:
    settings = {"precision": precision, "max_length": part.max_length, "dim": part.dim, "sides": part.num_outputs}
    write_json(folder / SETTINGS, settings)


class ONNXEncoder(Encoder):
    """An exported encoder: ``TokenBatch -> (N, D)`` by ONNX Runtime on the CPU. It has no weights and cannot be trained."""

    kind = "text"
    device = torch.device("cpu")
    dim, num_outputs = 0, 1  # replaced by those that are saved

    def __init__(self, folder: Path) -> None:
        super().__init__(Execution(layout="sorted", dropout="torch"))
        onnxruntime = _import("onnxruntime")
        self.saved: dict[str, Any] = read_json(str(folder), SETTINGS)
        self.max_length, self.dim, self.num_outputs = (int(self.saved[key]) for key in ("max_length", "dim", "sides"))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(str(folder / FILE), options, providers=["CPUExecutionProvider"])
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)

    def run(self, inputs: TokenBatch, execution: Execution) -> Tensor:
        """``TokenBatch -> (N, D)``."""
        return execution.run(self._embed, inputs)

    def _embed(self, rows: TokenBatch) -> Tensor:
        ids, mask, _ = rows.pad(int(self.tokenizer.pad_token_id or 0))
        (z,) = self.session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        return torch.from_numpy(z)

    def prepare(self, items: Sequence[Item]) -> TokenBatch:
        """Token ids with special tokens, cut at ``max_length``."""
        return tokenize(self.tokenizer, items, self.max_length)

    def settings(self) -> dict[str, Any]:
        """The content of ``onnx.json``."""
        return dict(self.saved)


def _makes_values(node: Any) -> bool:
    """Whether a node belongs to a layer that makes the values of attention."""
    scopes = next((pair.value for pair in node.metadata_props if pair.key.endswith("name_scopes")), "")
    return any(f".{names[1]}'" in scopes for names in KEY_VALUE)


class _PaddedEncoder(nn.Module):
    """The encoder as a function of padded rows, by operations that ONNX has."""

    def __init__(self, encoder: TextEncoder) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder).cpu().float().eval()
        self.encoder.backbone.set_attn_implementation("eager")

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        arguments = {"input_ids": input_ids, "attention_mask": attention_mask, **self.encoder.runner.type_arguments(input_ids)}
        output = self.encoder.backbone(**arguments, output_hidden_states=True, return_dict=True)
        return self.encoder.pool(output, attention_mask)


def _write_float32(encoder: TextEncoder, path: Path) -> None:
    ids = torch.full((3, 7), int(encoder.tokenizer.unk_token_id or 0))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    names = ["input_ids", "attention_mask"]
    shapes = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in names}
    options: Any = {"input_names": names, "output_names": ["z"], "dynamic_shapes": shapes, "dynamo": True}
    with _silence_exporter(), torch.no_grad():
        program: Any = torch.onnx.export(_PaddedEncoder(encoder), (ids, mask), **options)
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
