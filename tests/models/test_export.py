"""An exported encoder gives the same vectors, at lower precision nearly; it is opened as any other, and by other libraries."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tercet.app.components import build
from tercet.errors import InputError
from tercet.images import PixelFormat
from tercet.models import CachedEncoder, Head, ImageEncoder, load, random_backbone
from tercet.models.export import FILES, export_model
from tercet.models.exported import ONNX_SETTINGS, SETTINGS
from tercet.models.pretrained import add_lowercase
from tests.conftest import TEXTS, composed, tiny
from tests.models.test_saved_folders import RESNET, VIT

pytest.importorskip("onnxscript", reason="tercet[export] is not installed")
LONG = "a text that is longer than all that the export has seen " * 3


def encoder_of(*overrides):
    torch.manual_seed(0)
    return build(composed(*tiny(*overrides)).model).eval()


def open_again(folder):
    return load(folder, trust_remote_code=True)


QUICK = {("onnx", "float32"), ("onnx", "int8")}  # an export takes seconds
FORMATS = [
    pytest.param(kind, precision, marks=() if (kind, precision) in QUICK else pytest.mark.slow)
    for kind, files in FILES.items() for precision in files
]  # fmt: skip


@pytest.mark.parametrize(("kind", "precision"), FORMATS)
def test_each_format_gives_the_vectors_for_rows_of_any_number_and_length(tmp_path, kind, precision):
    if kind == "openvino":
        pytest.importorskip("openvino", reason="tercet[openvino] is not installed")
    encoder = encoder_of("model.head.kind=mlp", "model.head.train_only=false", "model.normalize=true")
    parity = export_model(encoder, tmp_path / "a", kind, precision)
    opened = open_again(tmp_path / "a")
    texts = [*TEXTS, "one", LONG, ""]
    found, want = CachedEncoder(opened)(texts), CachedEncoder(encoder)(texts)
    difference = (found - want).norm(dim=1).max()
    assert difference < {"float32": 1e-5, "float16": 5e-3, "int8": 0.2}[precision]
    assert (difference > 1e-6) == (precision != "float32")
    torch.testing.assert_close(opened.encode([LONG]), want[[-2]], rtol=0, atol=0.1)
    assert opened.dim == encoder.dim and parity.cosine > 0.97
    assert json.loads((tmp_path / "a" / SETTINGS).read_text())["parity"] == parity._asdict()
    file = tmp_path / "a" / FILES[kind][precision]
    assert {other.stem for other in file.parent.iterdir()} == {file.stem}, "what it was made of is removed"
    assert encoder.backbone.config._attn_implementation != "eager", "the encoder itself has changed"
    if kind == "onnx":
        check_layout(tmp_path / "a", file, encoder)


def check_layout(folder, file, encoder):
    """What optimum and transformers.js need: a file of the hidden states, its configuration, tokenizer and modules."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file)
    assert [x.name for x in session.get_inputs()] == ["input_ids", "attention_mask"]
    assert [x.name for x in session.get_outputs()] == ["last_hidden_state", "sentence_embedding"]
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "modules.json"} <= {
        path.name for path in folder.iterdir()
    }
    assert json.loads((folder / "config.json").read_text())["model_type"] == "bert"
    assert json.loads((folder / "tokenizer_config.json").read_text())["model_max_length"] == encoder.max_length
    modules = [module["type"].rsplit(".")[-1] for module in json.loads((folder / "modules.json").read_text())]
    assert modules == ["Transformer", "Pooling", "Dense", "Normalize"]


@pytest.mark.slow
def test_int8_is_near_and_small(tmp_path):
    minilm = build(composed("model=minilm").model).eval()
    sizes = {}
    for precision, file in FILES["onnx"].items():
        parity = export_model(minilm, tmp_path / precision, precision=precision)
        sizes[precision] = (tmp_path / precision / file).stat().st_size
        assert parity.cosine > {"float32": 0.99999, "float16": 0.9999, "int8": 0.97}[precision]
    assert sizes["int8"] < 0.7 * sizes["float32"] and sizes["float16"] < 0.6 * sizes["float32"]


def test_what_cannot_be_exported_says_so(tmp_path):
    words = build(composed("model=bag", "data=middle_english").model)
    encoder = encoder_of()
    for model, options, message in [
        (words, {}, "through one transformer"),
        (encoder, {"precision": "int4"}, "precision=int4: choose one of float32, float16, int8"),
        (encoder, {"format": "tflite"}, "format=tflite: choose one of onnx, openvino, torch_export"),
        (encoder, {"format": "torch_export", "precision": "int8"}, "precision=int8: format=torch_export has float32, float16"),
        (encoder, {"tolerance": 0}, "tolerance=0: a number above 0"),
        (encoder, {"format": "torch_export", "tolerance": 1e-12}, r"float32: its vectors would differ .* 1e-12 is accepted"),
    ]:
        with pytest.raises(InputError, match=message):
            export_model(model, tmp_path / "x", **options)
        assert not [*tmp_path.iterdir()], "nothing is left of it"
    export_model(encoder, tmp_path / "x", "torch_export")
    with pytest.raises(InputError, match=r"can hold pickles, which run code .*trust_remote_code=true opens it"):
        load(tmp_path / "x")
    saved = json.loads((tmp_path / "x" / SETTINGS).read_text())
    for change, message in [
        ({"format": "x"}, "its format is x"),
        ({"file": "../x"}, "the file '../x' is outside of the folder"),
    ]:
        (tmp_path / "x" / SETTINGS).write_text(json.dumps({**saved, **change}))
        with pytest.raises(InputError, match=message):
            open_again(tmp_path / "x")


def photos(count=3):
    for seed in range(count):
        file = io.BytesIO()
        pixels = np.random.default_rng(seed).integers(0, 256, (40, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, "png")
        yield file.getvalue()


@pytest.mark.parametrize(
    ("family", "kind", "precision"),
    [("resnet", "onnx", "float32"), ("vit", "onnx", "int8"), ("vit", "torch_export", "float32")],
)
def test_images_give_the_same_vectors(tmp_path, family, kind, precision):
    config = {"resnet": RESNET, "vit": VIT}[family]
    encoder = ImageEncoder(random_backbone(config), PixelFormat(32), "mean", Head("linear", 6), True).eval()
    export_model(encoder, tmp_path, kind, precision)
    opened, items = open_again(tmp_path), list(photos())
    tolerance = 1e-5 if precision == "float32" else 0.05
    torch.testing.assert_close(opened.encode(items), encoder.encode(items), rtol=0, atol=tolerance)
    torch.testing.assert_close(opened.encode(items[:1]), encoder.encode(items[:1]), rtol=0, atol=tolerance)
    with pytest.raises(InputError, match="reads images, but was given text"):
        opened.encode(TEXTS)


def test_prompts_lowercase_and_similarity_are_exported(tmp_path):
    encoder = encoder_of("model.prompt=['Query: ','Text: ']", "model.pooling=mean")
    add_lowercase(encoder.tokenizer)
    encoder.similarity_fn_name = "dot"
    export_model(encoder, tmp_path / "a")
    opened = load(tmp_path / "a")
    for method in ("encode", "encode_query", "encode_document"):
        torch.testing.assert_close(getattr(opened, method)(TEXTS), getattr(encoder, method)(TEXTS), rtol=1e-4, atol=1e-5)
    assert opened.similarity_fn_name == "dot"
    saved = json.loads((tmp_path / "a" / SETTINGS).read_text())  # as versions before 0.3 wrote it
    (tmp_path / "a" / SETTINGS).rename(tmp_path / "a" / ONNX_SETTINGS)
    (tmp_path / "a" / saved["file"]).rename(tmp_path / "a" / "model.onnx")
    (tmp_path / "a" / ONNX_SETTINGS).write_text(json.dumps({k: v for k, v in saved.items() if k not in ("format", "file")}))
    torch.testing.assert_close(load(tmp_path / "a").encode(TEXTS), opened.encode(TEXTS))


@pytest.mark.slow
def test_a_prompt_that_is_not_pooled_is_fixed(tmp_path):
    encoder = encoder_of("model.prompt='Query: '", "model.pooling=mean")
    encoder.prompts = replace(encoder.prompts, pooled=False)
    export_model(encoder, tmp_path)
    torch.testing.assert_close(load(tmp_path).encode(TEXTS), encoder.encode(TEXTS), rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="this model's prompt is fixed"):
        load(tmp_path).encode(TEXTS, prompt="x")


@pytest.mark.parametrize("head", ["none", "mlp"])
def test_sentence_transformers_opens_it_by_onnx(tmp_path, head):
    pytest.importorskip("optimum.onnxruntime", reason="optimum-onnx is not installed; it needs transformers below 5")
    from sentence_transformers import SentenceTransformer

    encoder = encoder_of(
        f"model.head.kind={head}", "model.head.train_only=false", "model.prompt='query: '", "model.normalize=true"
    )
    export_model(encoder, tmp_path)
    library = SentenceTransformer(str(tmp_path), device="cpu", backend="onnx")
    torch.testing.assert_close(library.encode(TEXTS, convert_to_tensor=True), encoder.encode(TEXTS), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_layers_that_onnx_does_not_give_are_refused_by_sentence_transformers(tmp_path):
    encoder = encoder_of("model.pooling=first_last")
    export_model(encoder, tmp_path)
    torch.testing.assert_close(load(tmp_path).encode(TEXTS), encoder.encode(TEXTS), rtol=1e-4, atol=1e-5)
    (module,) = json.loads((tmp_path / "modules.json").read_text())
    assert module["type"] == "tercet.models.TextEncoder"
