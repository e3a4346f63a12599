"""An exported encoder gives the same vectors, in int8 nearly, and is measured as any other."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tercet.app.components import build
from tercet.errors import InputError
from tercet.images import PixelFormat
from tercet.models import CachedEncoder, Head, ImageEncoder, load, random_backbone
from tercet.models.onnx import export_onnx, open_exported
from tercet.models.pretrained import add_lowercase
from tests.conftest import TEXTS, composed, tiny
from tests.models.test_saved_folders import RESNET, VIT

pytest.importorskip("onnxscript", reason="tercet[export] is not installed")


def encoder_of(*overrides):
    torch.manual_seed(0)
    return build(composed(*tiny(*overrides)).model).eval()


@pytest.mark.parametrize("head", ["none", "mlp"])
def test_the_file_gives_the_same_vectors(tmp_path, head):
    encoder = encoder_of(f"model.head.kind={head}", "model.head.train_only=false", "model.normalize=true")
    export_onnx(encoder, tmp_path / "a", "float32")
    opened = open_exported(tmp_path / "a")
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
        vectors.append(CachedEncoder(open_exported(tmp_path / precision))(TEXTS))
    assert sizes[1] < 0.7 * sizes[0]
    assert (vectors[0] * vectors[1]).sum(1).min() > 0.98
    assert not (tmp_path / "int8" / "float32.onnx").exists()


def test_what_cannot_be_exported_says_so(tmp_path):
    words = build(composed("model=bag", "data=middle_english").model)
    with pytest.raises(InputError, match="through one transformer"):
        export_onnx(words, tmp_path / "b", "float32")
    with pytest.raises(InputError, match="precision=int4"):
        export_onnx(encoder_of(), tmp_path / "c", "int4")


def photos(count=3):
    for seed in range(count):
        file = io.BytesIO()
        pixels = np.random.default_rng(seed).integers(0, 256, (40, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, "png")
        yield file.getvalue()


@pytest.mark.parametrize(("family", "precision"), [("resnet", "float32"), ("vit", "int8")])
def test_images_give_the_same_vectors(tmp_path, family, precision):
    config = {"resnet": RESNET, "vit": VIT}[family]
    encoder = ImageEncoder(random_backbone(config), PixelFormat(32), "mean", Head("linear", 6), True).eval()
    export_onnx(encoder, tmp_path, precision)
    opened, items = load(tmp_path), list(photos())
    tolerance = 1e-5 if precision == "float32" else 0.05
    torch.testing.assert_close(opened.encode(items), encoder.encode(items), rtol=0, atol=tolerance)
    torch.testing.assert_close(opened.encode(items[:1]), encoder.encode(items[:1]), rtol=0, atol=tolerance)
    with pytest.raises(InputError, match="reads images, but was given text"):
        opened.encode(TEXTS)


def test_the_prompt_and_lowercase_are_exported(tmp_path):
    encoder = encoder_of("model.prompt='Query: '", "model.pooling=mean")
    add_lowercase(encoder.tokenizer)
    encoder.prompts = replace(encoder.prompts, pooled=False)
    export_onnx(encoder, tmp_path, "float32")
    torch.testing.assert_close(load(tmp_path).encode(TEXTS), encoder.encode(TEXTS), rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="this model's prompt is fixed"):
        load(tmp_path).encode(TEXTS, prompt="x")
