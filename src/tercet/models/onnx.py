"""An encoder as one ONNX file: ``input_ids (n, L)`` and ``attention_mask (n, L)`` in, ``z (n, D)`` out. Runs without torch."""

import contextlib
import copy
import io
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tercet.errors import InputError
from tercet.models.engine.chunking import Execution
from tercet.models.engine.packing import KEY_VALUE
from tercet.models.text import Encoder, TextEncoder, tokenize
from tercet.models.words import WordModel
from tercet.types import Inputs, Item, TokenBatch

FILE = "model.onnx"
NOTE = "onnx.json"
PRECISIONS = ("float32", "int8")
SORTED = Execution(layout="sorted", dropout="torch", chunk_tokens=None, chunk_rows=None, recompute=False)


def export_onnx(encoder: Encoder, folder: Path, precision: str) -> None:
    """Write ``model.onnx``, the tokenizer and how texts are cut.

    ``int8``: linear layers in 8 bits, a scale for each output column of the weights, one for the activations of a chunk
    as they come. The values of attention stay in float32: rounded, they cost most (docs/lab/benchmarks.md). A CPU without VNNI
    adds up two products in 16 bits, which may saturate.

    Raises:
        InputError: not an encoder of texts by a transformer, an unknown precision, or onnx is not installed.
    """
    if precision not in PRECISIONS:
        raise InputError(f"precision={precision}: choose one of {', '.join(PRECISIONS)}.")
    if not isinstance(encoder, TextEncoder) or isinstance(encoder.backbone, WordModel):
        raise InputError("export is for texts through one transformer; this model is of another kind.")
    folder.mkdir(parents=True, exist_ok=True)
    whole = folder / FILE
    with _needed():
        import onnx
        from onnxruntime.quantization import QuantType, quantize_dynamic
    _write(encoder, whole)
    if precision == "int8":
        full = whole.rename(folder / "float32.onnx")
        nodes = onnx.load(full).graph.node
        settings = {"per_channel": True, "weight_type": QuantType.QInt8, "op_types_to_quantize": ["MatMul", "Gemm"]}
        with _silent():
            quantize_dynamic(full, whole, nodes_to_exclude=[node.name for node in nodes if _is_value(node)], **settings)
        full.unlink()
    encoder.tokenizer.save_pretrained(folder)
    note = {"precision": precision, "max_length": encoder.max_length, "dim": encoder.dim, "sides": encoder.num_outputs}
    (folder / NOTE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")


class ONNXEncoder(Encoder):
    """``Ragged -> (N, D)`` by ONNX Runtime on the CPU: for `Encoding`; it holds no weights and cannot be trained."""

    kind = "text"

    def __init__(self, folder: Path) -> None:
        nn.Module.__init__(self)
        with _needed():
            import onnxruntime
        self.note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(str(folder / FILE), options, providers=["CPUExecutionProvider"])
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        self.max_length: int = self.note["max_length"]
        self.execution = SORTED

    def run(self, inputs: Inputs, execution: Execution) -> Tensor:
        """``Ragged -> (N, D)``."""
        return execution.run(self._rows, inputs)

    def _rows(self, rows: TokenBatch) -> Tensor:
        ids, mask, _ = rows.pad(int(self.tokenizer.pad_token_id or 0))
        (z,) = self.session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        return torch.from_numpy(z)

    def prepare(self, items: Sequence[Item]) -> TokenBatch:
        """Token ids with special tokens, cut at ``max_length``."""
        return tokenize(self.tokenizer, items, self.max_length)

    def settings(self) -> dict[str, Any]:
        """What was written beside the file."""
        return dict(self.note)

    @property
    def dim(self) -> int:
        """D."""
        return int(self.note["dim"])

    @property
    def num_outputs(self) -> int:
        """As the encoder that was exported."""
        return int(self.note["sides"])

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")


def _is_value(node: Any) -> bool:
    """Whether a node comes from a layer that makes the values of attention."""
    scopes = next((pair.value for pair in node.metadata_props if pair.key.endswith("name_scopes")), "")
    return any(f".{names[1]}'" in scopes for names in KEY_VALUE)


class _Padded(nn.Module):
    """The encoder as a function of padded rows, in parts that ONNX has."""

    def __init__(self, encoder: TextEncoder) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder).cpu().float().eval()
        self.encoder.backbone.set_attn_implementation("eager")

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        output = self.encoder.backbone(
            input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True, return_dict=True
        )
        return self.encoder.pool(output, attention_mask)


def _write(encoder: TextEncoder, path: Path) -> None:
    ids = torch.full((3, 7), int(encoder.tokenizer.unk_token_id or 0))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    names = ["input_ids", "attention_mask"]
    shapes = {key: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for key in names}
    with _silent(), torch.no_grad():
        program: Any = torch.onnx.export(
            _Padded(encoder), (ids, mask), input_names=names, output_names=["z"], dynamic_shapes=shapes, dynamo=True
        )
        program.save(path)


@contextlib.contextmanager
def _needed() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise InputError(f"{error.name} is not installed: pip install 'tercet[export]'.") from error


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """The exporter prints its steps, and warns of what concerns its authors."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
