"""Export of an encoder as ONNX, OpenVINO or torch.export, which need no code of a model.

Texts: ``input_ids (n, L)``, ``attention_mask (n, L)`` to ``last_hidden_state (n, L, H)`` and ``sentence_embedding (n, D)``.
Images: 8-bit ``pixels (n, C, S, S)`` to ``sentence_embedding (n, D)``. n and L are free.
"""

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from tercet.errors import check_choice, import_extra, require
from tercet.images import encode_png
from tercet.models.encoder import Encoder
from tercet.models.engine.packing import KEY_VALUE
from tercet.models.exported import OUTPUT, SETTINGS, open_exported
from tercet.models.pooling import NEEDS_ALL_LAYERS
from tercet.models.pretrained import write_json
from tercet.models.sentence_transformers import refuse_to_open, write_modules
from tercet.paths import atomic_folder
from tercet.types import Item

FILES = {  # in the folder, by format and precision: as sentence-transformers and transformers.js look for them
    "onnx": {"float32": "onnx/model.onnx", "float16": "onnx/model_fp16.onnx", "int8": "onnx/model_quantized.onnx"},
    "openvino": {
        "float32": "openvino/openvino_model.xml", "float16": "openvino/openvino_model_fp16.xml",
        "int8": "openvino/openvino_model_qint8_quantized.xml",
    },
    "torch_export": {"float32": "torch_export/model.pt2", "float16": "torch_export/model_fp16.pt2"},
}  # fmt: skip
TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "int8": 0.4}  # of the difference, in lengths of the vector
SAMPLES = (
    "A man plays.", "", "Is it far from here to the station, and when does the last train leave?", "42", "A naïve Ärztin.",
    "Prices rose sharply in March, analysts said on Monday, and fell again.", "日本語の文。", "one two three four five " * 100,
)  # fmt: skip


class Parity(NamedTuple):
    """How far embeddings of an exported encoder are from its own on some samples: see ``measure_parity``."""

    difference: float
    cosine: float
    samples: int


def export_model(
    encoder: Encoder, folder: Path, format: str = "onnx", precision: str = "float32", tolerance: float | None = None
) -> Parity:
    """Write a folder that ``tercet.load`` opens: one file, how items are prepared for it, and for texts the tokenizer.

    With ``format="onnx"`` sentence-transformers (``backend="onnx"``) and transformers.js open that of texts too.
    ``int8``: linear layers in 8 bits, with a scale for each output column of the weights and one for the activations of a
    chunk, found at run time. The values of attention stay in float32: rounding them costs most (docs/lab/benchmarks.md), and
    so do convolutions. A CPU without VNNI adds two products in 16 bits, which may saturate.

    The file is run on samples, and nothing is written if a vector differs from the encoder's by more than ``tolerance`` times
    its length; None is 0.001 in float32, 0.02 in float16, 0.4 in int8.
    """
    check_choice("format", format, [*FILES])
    check_choice("precision", precision, [*TOLERANCE])
    has = ", ".join(FILES[format])
    require(precision in FILES[format], f"`precision`={precision}: `format`={format} has {has}. Or use `format`=onnx.")
    accepted = TOLERANCE[precision] if tolerance is None else tolerance
    require(accepted > 0, f"`tolerance`={tolerance}: a number above 0 is needed.")
    part = _exportable(encoder)
    with atomic_folder(folder) as made:
        target = made / FILES[format][precision]
        target.parent.mkdir()
        with _silence_exporter(), torch.no_grad():
            _write(part, target, format, precision)
        if part.tokenizer is not None:
            _write_text_files(part, made)
        # "sides" is num_outputs in the files of all versions:
        described = {"format": format, "file": FILES[format][precision], "precision": precision}
        saved = {**described, "dim": part.dim, "sides": part.num_outputs, **part.settings()}
        write_json(made / SETTINGS, saved)
        parity = measure_parity(encoder, open_exported(made, trust_remote_code=True))
        write_json(made / SETTINGS, {**saved, "parity": parity._asdict()})
        fault = f"its vectors would differ from the model's by {parity.difference:.2g} times their length"
        advice = "Use a higher precision, or accept it by `tolerance`"
        exact = parity.difference <= accepted  # not where a vector is not finite
        require(exact, f"`precision`={precision}: {fault} on samples; {accepted:g} is accepted. {advice}.")
    return parity


def measure_parity(encoder: Encoder, exported: Encoder) -> Parity:
    """The largest distance to an embedding in lengths of that, and the least cosine, on a few texts or images."""
    samples: list[Item] = [*SAMPLES] if encoder.text_parts() else [*_images()]
    ours, theirs = encoder.encode(samples), exported.encode(samples)
    difference = (ours - theirs).norm(dim=1) / ours.norm(dim=1).clamp(min=1e-12)
    return Parity(float(difference.max()), float(F.cosine_similarity(ours, theirs).min()), len(samples))


def _images() -> Iterator[bytes]:
    random = np.random.default_rng(0)
    for size in ((32, 32), (48, 30), (20, 64)):
        yield encode_png(Image.fromarray(random.integers(0, 256, (*size, 3), np.uint8)))


def _exportable(encoder: Encoder) -> Any:
    """The one part of the encoder; ``InputError`` where it cannot be run on padded rows."""
    parts: list[Any] = list(encoder.parts())
    one = len(parts) == 1 and not getattr(parts[0], "word_level", False)
    require(one, "export is for texts through one transformer, and for images; this model is of another kind.")
    part = parts[0]
    name, reason = type(part.backbone).__name__, "" if part.tokenizer is None else part.runner.cannot_pad
    require(not reason, f"export is for padded rows, which {name} cannot read: {reason}.")
    return part


def _write_text_files(part: Any, folder: Path) -> None:
    """The tokenizer, and the settings by which others pool the hidden states, or refuse to."""
    tokenizer = copy.deepcopy(part.tokenizer)
    tokenizer.model_max_length = part.max_length  # where transformers.js cuts
    tokenizer.save_pretrained(folder)
    part.backbone.config.save_pretrained(folder)
    if part.pooling in NEEDS_ALL_LAYERS:
        refuse_to_open(folder, part)
    else:
        write_modules(part, folder, torch.float32)


def _write(part: Any, target: Path, format: str, precision: str) -> None:
    half = format == "torch_export" and precision == "float16"
    inputs, module = _example(part), (_PixelEncoder if part.tokenizer is None else _PaddedEncoder)(part, half)
    dynamic = torch.export.Dim.DYNAMIC
    shapes = dict.fromkeys(inputs, {0: dynamic} if part.tokenizer is None else {0: dynamic, 1: dynamic})
    if format == "torch_export":
        torch.export.save(torch.export.export(module, tuple(inputs.values()), dynamic_shapes=shapes), target)
        return
    outputs = [OUTPUT] if part.tokenizer is None else ["last_hidden_state", OUTPUT]
    options: Any = {"input_names": [*inputs], "output_names": outputs, "dynamic_shapes": shapes, "dynamo": True}
    import_extra("onnxscript", "export")
    program: Any = torch.onnx.export(module, tuple(inputs.values()), **options)
    full = target.with_name("full.onnx")
    program.save(full)
    if format == "onnx":
        _lower_precision(full, target, precision)
    else:
        openvino, source = import_extra("openvino", "openvino"), full
        if precision == "int8":
            _lower_precision(full, source := target.with_name("int8.onnx"), precision)
        openvino.save_model(openvino.convert_model(str(source)), target, compress_to_fp16=precision == "float16")
        source.unlink()
    full.unlink(missing_ok=True)


def _lower_precision(full: Path, target: Path, precision: str) -> None:
    """Write an ONNX file of another precision."""
    if precision == "float32":
        full.rename(target)
    elif precision == "float16":
        onnx, float16 = import_extra("onnx", "export"), import_extra("onnxruntime.transformers.float16", "export")
        onnx.save(float16.convert_float_to_float16(onnx.load(full), keep_io_types=True), target)
    else:
        quantization = import_extra("onnxruntime.quantization", "export")
        excluded = [node.name for node in import_extra("onnx", "export").load(full).graph.node if _makes_values(node)]
        kind = quantization.QuantType.QInt8
        options = {"per_channel": True, "weight_type": kind, "op_types_to_quantize": ["MatMul", "Gemm"]}
        quantization.quantize_dynamic(full, target, nodes_to_exclude=excluded, **options)


def _makes_values(node: Any) -> bool:
    """Whether a node belongs to a layer that makes the values of attention."""
    scopes = next((pair.value for pair in node.metadata_props if pair.key.endswith("name_scopes")), "")
    return any(f".{names[1]}'" in scopes for names in KEY_VALUE)


def _example(part: Any) -> dict[str, Tensor]:
    """Inputs from which the operations are recorded."""
    if part.tokenizer is None:
        return {"pixels": torch.zeros(3, part.pixels.channels, part.pixels.size, part.pixels.size, dtype=torch.uint8)}
    ids = torch.full((3, 7), int(part.tokenizer.unk_token_id or 0))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


class _PaddedEncoder(nn.Module):
    """The encoder as a function of padded rows, by operations that the formats have."""

    def __init__(self, encoder: Any, half: bool) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder).cpu().float().eval()
        self.encoder.backbone.set_attn_implementation("eager")
        if half:
            self.encoder.half()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        arguments = {"input_ids": input_ids, "attention_mask": attention_mask, **self.encoder.runner.type_arguments(input_ids)}
        output = self.encoder.backbone(**arguments, output_hidden_states=True, return_dict=True)
        return output.last_hidden_state.float(), self.encoder.pool(output, attention_mask).float()


class _PixelEncoder(_PaddedEncoder):
    """The encoder as a function of 8-bit pixels."""

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return (self.encoder.embed(pixels).float(),)


@contextlib.contextmanager
def _silence_exporter() -> Iterator[None]:
    """The exporters print their steps, and warnings for their own developers."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
