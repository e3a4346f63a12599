"""Every kind of model that can be saved: other libraries open its folder with equal vectors, or refuse it."""

import io
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from tercet.app.commands.evaluate import initialize_from
from tercet.errors import InputError
from tercet.images import PixelFormat
from tercet.models import (
    DualEncoder,
    Head,
    ImageEncoder,
    TextEncoder,
    load,
    load_tokenizer,
    make_tokenizer,
    random_backbone,
    save_model,
    word_backbone,
)  # fmt: skip
from tercet.models.folder import SETTINGS, load_checkpoint_encoder
from tests.conftest import TEXTS, TINY, TOKENIZER
from tests.models.test_loading import write_checkpoint

RESNET = {"model_type": "resnet", "num_channels": 3, "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1],
          "layer_type": "basic"}  # fmt: skip
VIT = {"model_type": "vit", "image_size": 32, "patch_size": 8, "num_channels": 3, "hidden_size": 16, "num_hidden_layers": 1,
       "num_attention_heads": 2, "intermediate_size": 32}  # fmt: skip


def text(pooling="mean", head=None, normalize=True, **options):
    tokenizer = load_tokenizer(TOKENIZER)
    backbone = random_backbone({"model_type": "bert", "vocab_size": len(tokenizer), **TINY})
    return TextEncoder(backbone, tokenizer, pooling, head, normalize, 32, **options)


def words(pooling="final"):
    tokenizer = make_tokenizer(["a", "man", "is", "playing"])
    return TextEncoder(word_backbone(tokenizer, hidden_size=8, trained_dim=4), tokenizer, pooling)


def image(config=RESNET, norm="keep", pooling="mean", head=None):
    encoder = ImageEncoder(random_backbone(config), PixelFormat(32), pooling, head, True, norm)
    encoder(encoder.prepare(photos()))  # moves running statistics
    return encoder


def photos(size=(32, 32)):
    for seed in range(4):
        file = io.BytesIO()
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(file, "png")
        yield file.getvalue()


@dataclass
class Kind:
    """A kind of model, and whether the two libraries open its folder."""

    make: Any
    sentence_transformers: bool
    transformers: bool


KINDS = {
    "text": Kind(text, True, True),
    "text, cls_pooler": Kind(lambda: text("cls_pooler"), True, True),
    "text, two layers, a head": Kind(lambda: text("first_last", Head("mlp", 8)), True, True),
    "text, a prompt": Kind(lambda: text(prompt="query: "), True, True),
    "text, f and g by a head": Kind(lambda: text(head=Head("two_mlp", 6), normalize=False), True, True),
    "text, normalized f and g": Kind(lambda: text(head=Head("two_linear", 6)), False, True),
    "two encoders": Kind(lambda: DualEncoder(text(), text()), False, False),
    "words": Kind(words, False, True),
    "two encoders of words": Kind(lambda: DualEncoder(words(), words("mean")), False, False),
    "images, a head": Kind(lambda: image(head=Head("linear", 5)), False, True),
    "images, ViT": Kind(lambda: image(VIT, pooling="cls_pooler"), False, True),
    "images, frozen": Kind(lambda: image(norm="frozen"), False, True),
    "images, group normalization": Kind(lambda: image(norm="group"), False, False),
}


@pytest.fixture(params=KINDS)
def saved(request, tmp_path):
    kind = KINDS[request.param]
    encoder = kind.make().eval()
    save_model(encoder, tmp_path / "model")
    return kind, encoder, tmp_path / "model", list(photos()) if request.param.startswith("images") else TEXTS


def test_tercet_gives_equal_vectors(saved, tmp_path):
    _, encoder, folder, items = saved
    again = load(folder)
    torch.testing.assert_close(again.encode(items), encoder.encode(items), rtol=0, atol=1e-5)
    assert again.settings() == encoder.settings()
    write_checkpoint(encoder, tmp_path / "x.ckpt")
    by_checkpoint = load_checkpoint_encoder(tmp_path / "x.ckpt").eval()
    torch.testing.assert_close(by_checkpoint.encode(items), encoder.encode(items), rtol=0, atol=1e-5)


def test_sentence_transformers_gives_equal_vectors_or_an_error(saved):
    library = pytest.importorskip("sentence_transformers")
    kind, encoder, folder, items = saved
    if not kind.sentence_transformers:
        with pytest.raises((ValueError, OSError, ImportError, KeyError, AttributeError)):
            library.SentenceTransformer(str(folder), device="cpu")
        return
    theirs = library.SentenceTransformer(str(folder), device="cpu").encode(items, convert_to_tensor=True)
    torch.testing.assert_close(theirs, encoder.encode(items), rtol=0, atol=1e-5)


def test_transformers_gives_equal_hidden_states_or_an_error(saved, monkeypatch):
    kind, encoder, folder, items = saved
    if not kind.transformers:
        with pytest.raises((ValueError, OSError)):
            AutoModel.from_pretrained(folder)
        return
    backbone = AutoModel.from_pretrained(folder).eval()
    if items is TEXTS:
        ids = encoder.prepare(items[:1]).ids[None]
        theirs = backbone(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
        vector = encoder.pool(theirs, torch.ones_like(ids))
    else:
        pixels = (encoder.prepare(items[:1]).pixels / 255 - encoder.mean) / encoder.std
        monkeypatch.setattr(encoder, "backbone", backbone)
        assert torch.equal(pixels, (encoder.prepare(items[:1]).pixels.float() / 255 - 0.5) / 0.5)
        vector = encoder(encoder.prepare(items[:1]))
    torch.testing.assert_close(vector, encoder.encode(items[:1]), rtol=0, atol=1e-5)


def test_transformers_alone_knows_no_model_of_words():
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    assert "tercet_words" not in CONFIG_MAPPING_NAMES


def test_folders_of_version_1_open(tmp_path):
    encoder = image(norm="group").eval()
    save_model(encoder, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())  # it had the model's own type
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "resnet"}))
    (tmp_path / SETTINGS).write_text(json.dumps({**json.loads((tmp_path / SETTINGS).read_text()), "version": 1}))
    torch.testing.assert_close(load(tmp_path).encode(list(photos())), encoder.encode(list(photos())))


def test_weights_that_a_checkpoint_lacks_are_named(encoder, tmp_path):
    write_checkpoint(encoder, tmp_path / "x.ckpt")
    content = torch.load(tmp_path / "x.ckpt", weights_only=True)
    compiled = {name.replace("encoder.", "_orig_mod.encoder.", 1): x for name, x in content["state_dict"].items()}
    torch.save({**content, "state_dict": compiled}, tmp_path / "compiled.ckpt")
    torch.testing.assert_close(load(tmp_path / "compiled.ckpt").encode(TEXTS), encoder.encode(TEXTS))
    name = next(name for name in content["state_dict"] if "layer.1." in name)
    del content["state_dict"][name]
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(InputError, match=rf"x.ckpt: it lacks weights of the model: {name.removeprefix('encoder.')}"):
        load(tmp_path / "x.ckpt")


def test_init_from_reads_the_model_whole(encoder, tmp_path):
    save_model(encoder, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({f"module.{k}": x for k, x in weights.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    other = text(normalize=False, prompt="query: ")
    assert initialize_from(other, str(tmp_path)).endswith("its prompt is '', here 'query: '")
    torch.testing.assert_close(other.encode(TEXTS, prompt=""), encoder.encode(TEXTS))
    save_file({k: x for k, x in weights.items() if "layer.0" not in k}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"init_from=.*it lacks weights of the model: encoder.layer.0"):
        initialize_from(other, str(tmp_path))


def test_a_head_without_its_file_is_refused(tmp_path):
    save_model(text(head=Head("mlp", 8)), tmp_path)
    (tmp_path / "head.safetensors").unlink()
    with pytest.raises(InputError, match=r"the head: it lacks weights of the model: layer.0.bias, layer.0.weight"):
        load(tmp_path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_images_and_words_are_saved_in_half_precision_and_read_in_float32(tmp_path, dtype):
    for made, items in ((image(head=Head("linear", 4)).eval(), list(photos())), (words().eval(), TEXTS)):
        save_model(made, tmp_path / made.kind, dtype)
        again = load(tmp_path / made.kind)
        assert {p.dtype for p in again.parameters()} == {torch.float32}
        torch.testing.assert_close(again.encode(items), made.encode(items), rtol=0.02, atol=0.02)
