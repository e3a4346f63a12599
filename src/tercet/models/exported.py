"""Opening exported encoders: ONNX, OpenVINO and torch.export."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tercet.errors import InputError, import_extra, require
from tercet.images import PixelFormat
from tercet.models import pretrained
from tercet.models.encoder import Encoder
from tercet.models.engine.chunking import Execution
from tercet.models.image import ImageEncoder, ImageInputs
from tercet.models.prompts import Prompts
from tercet.models.text import tokenize
from tercet.types import Item

SETTINGS = "export.json"
ONNX_SETTINGS = "onnx.json"  # of exports by versions before 0.3, whose file is model.onnx
OUTPUT = "sentence_embedding"
Run = Callable[[dict[str, Any]], Any]  # arrays by the names of the inputs, to the embeddings (n, D)


def is_exported(folder: Path) -> bool:
    """Whether a folder holds an exported encoder."""
    return any((folder / name).is_file() for name in (SETTINGS, ONNX_SETTINGS))


def open_exported(folder: Path, trust_remote_code: bool = False) -> "ExportedEncoder":
    """The exported encoder of a folder, of texts or images; one by torch.export only with ``trust_remote_code``."""
    saved = pretrained.read_json(str(folder), SETTINGS)
    saved = saved or {"format": "onnx", "file": "model.onnx", **pretrained.read_json(str(folder), ONNX_SETTINGS)}
    kind = ExportedImageEncoder if saved.get("kind") == ImageEncoder.kind else ExportedEncoder
    return kind(folder, saved, trust_remote_code)


class ExportedEncoder(Encoder):
    """An exported encoder of texts: ``TokenBatch -> (N, D)`` on the CPU. It has no weights here and cannot be trained."""

    kind = "text"
    device = torch.device("cpu")
    dim, num_outputs = 0, 1  # replaced by those that are saved

    def __init__(self, folder: Path, saved: dict[str, Any], trust_remote_code: bool = False) -> None:
        super().__init__(Execution(layout="sorted", dropout="torch"))
        self.saved, self.dim, self.num_outputs = saved, int(saved["dim"]), int(saved["sides"])
        self.similarity_fn_name = saved.get("similarity", "cosine")
        self.call = _open(folder, saved["format"], saved["file"], trust_remote_code)
        self._read_inputs(folder)

    def _read_inputs(self, folder: Path) -> None:
        self.max_length, self.prompts = int(self.saved["max_length"]), Prompts(**self.saved.get("prompts", {}))
        pretrained.refuse_remote_code(str(folder), "", f"`path_or_id`={folder}", has_switch=False)
        self.tokenizer: PreTrainedTokenizerBase = pretrained.load_pretrained(AutoTokenizer, str(folder), "path_or_id")
        pretrained.drop_foreign_templates(self.tokenizer)
        if self.saved.get("lower_case"):
            pretrained.add_lowercase(self.tokenizer)

    def prompted(self) -> Sequence[Any]:
        """Itself, unless the pooling that was exported leaves out the tokens of its prompt."""
        return [self] if self.prompts.pooled else []

    def run(self, inputs: Any, execution: Execution) -> Tensor:
        """``TokenBatch -> (N, D)``."""
        return execution.run(self.embed, inputs)

    def embed(self, rows: Any) -> Tensor:
        """``n`` rows to ``(n, D)`` in one pass."""
        ids, mask, _ = rows.pad(int(self.tokenizer.pad_token_id or 0))
        return self._call(input_ids=ids, attention_mask=mask)

    def _call(self, **inputs: Tensor) -> Tensor:
        return torch.as_tensor(self.call({name: x.numpy() for name, x in inputs.items()}))

    def prepare(self, items: Sequence[Item]) -> Any:
        """Token ids with special tokens and the prompt, cut at ``max_length``."""
        return tokenize(self.tokenizer, self.prompts.add(items), self.max_length)

    def settings(self) -> dict[str, Any]:
        """The content of ``export.json``."""
        return dict(self.saved)


class ExportedImageEncoder(ImageInputs, ExportedEncoder):
    """An exported encoder of images: ``Images -> (N, D)``."""

    kind = "image"

    def _read_inputs(self, folder: Path) -> None:
        self.pixels = PixelFormat(**self.saved["pixels"])

    def prompted(self) -> Sequence[Any]:
        """None."""
        return []

    def embed(self, pixels: Tensor) -> Tensor:
        """``pixels (n, C, S, S)``, 8-bit, to ``(n, D)`` in one pass."""
        return self._call(pixels=pixels)


def _open(folder: Path, kind: str, name: str, trust_remote_code: bool) -> Run:
    """The function from inputs to embeddings in a file of the folder."""
    require(not re.search(pretrained.OUTSIDE, name), f"{folder / SETTINGS}: the file {name!r} is outside of the folder.")
    opened = {"onnx": _open_onnx, "openvino": _open_openvino, "torch_export": _open_torch}.get(kind)
    if opened is None:
        raise InputError(f"{folder / SETTINGS}: its format is {kind}, which this version of tercet does not know.")
    if kind == "torch_export":
        reason = "a file of torch.export can hold pickles, which run code when they are opened"
        require(trust_remote_code, f"`path_or_id`={folder}: {reason}. If it is your own, `trust_remote_code`=true opens it.")
    return opened(folder / name)


def _open_onnx(file: Path) -> Run:
    onnxruntime = import_extra("onnxruntime", "export")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    output = session.get_outputs()[-1].name
    return lambda inputs: session.run([output], inputs)[0]


def _open_openvino(file: Path) -> Run:
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    model = import_extra("openvino", "openvino").Core().compile_model(str(file), "CPU", options)
    return lambda inputs: np.array(model(inputs)[model.outputs[-1]])


def _open_torch(file: Path) -> Run:
    module = torch.export.load(file).module()

    @torch.no_grad()
    def run(inputs: dict[str, Any]) -> Any:
        return module(*map(torch.from_numpy, inputs.values()))[-1]

    return run
