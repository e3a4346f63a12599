"""An exported encoder gives the same vectors, in int8 nearly, and is measured as any other."""

import pytest
import torch

from tercet.app.components import build
from tercet.errors import InputError
from tercet.models import CachedEncoder
from tercet.models.onnx import ONNXEncoder, export_onnx
from tests.conftest import TEXTS, composed, tiny

pytest.importorskip("onnxscript", reason="tercet[export] is not installed")


def encoder_of(*overrides):
    torch.manual_seed(0)
    return build(composed(*tiny(*overrides)).model).eval()


@pytest.mark.parametrize("head", ["none", "mlp"])
def test_the_file_gives_the_same_vectors(tmp_path, head):
    encoder = encoder_of(f"model.head.kind={head}", "model.head.train_only=false", "model.normalize=true")
    export_onnx(encoder, tmp_path / "a", "float32")
    opened = ONNXEncoder(tmp_path / "a")
    texts = [*TEXTS, "one", "a text that is longer than all that the export has seen " * 3, ""]
    torch.testing.assert_close(CachedEncoder(opened)(texts), CachedEncoder(encoder)(texts), rtol=1e-4, atol=1e-5)
    assert opened.dim == encoder.dim
    assert encoder.backbone.config._attn_implementation != "eager", "the encoder itself has changed"


@pytest.mark.slow
def test_int8_is_near_and_small(tmp_path):
    minilm = build(composed("model=minilm").model).eval()
    sizes, vectors = [], []
    for precision in ("float32", "int8"):
        export_onnx(minilm, tmp_path / precision, precision)
        sizes.append((tmp_path / precision / "model.onnx").stat().st_size)
        vectors.append(CachedEncoder(ONNXEncoder(tmp_path / precision))(TEXTS))
    assert sizes[1] < 0.7 * sizes[0]
    assert (vectors[0] * vectors[1]).sum(1).min() > 0.98
    assert not (tmp_path / "int8" / "float32.onnx").exists()


def test_what_cannot_be_exported_says_so(tmp_path):
    words = build(composed("model=bag", "data=middle_english").model)
    with pytest.raises(InputError, match="through one transformer"):
        export_onnx(words, tmp_path / "b", "float32")
    with pytest.raises(InputError, match="precision=int4"):
        export_onnx(encoder_of(), tmp_path / "c", "int4")
