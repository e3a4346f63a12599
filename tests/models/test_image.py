"""Encoding of images with the backbones of transformers."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from tercet.app.components import build
from tercet.errors import InputError
from tercet.models import CachedEncoder, Execution
from tercet.models.folder import KEY, encoder_spec, load_checkpoint_encoder, load_folder, save_model
from tercet.types import Images
from tests.conftest import TEXTS, composed

CONFIG = "+model.backbone.config="
FAMILIES = {
    "resnet": [CONFIG + "{model_type:resnet,num_channels:1,embedding_size:8,hidden_sizes:[8,16],depths:[1,1],"
               "layer_type:basic}"],
    "vit": [CONFIG + "{model_type:vit,image_size:32,patch_size:8,num_channels:1,hidden_size:16,num_hidden_layers:1,"
            "num_attention_heads:2,intermediate_size:32}"],
    "convnext": [CONFIG + "{model_type:convnext,num_channels:1,hidden_sizes:[8,16],depths:[1,1],num_stages:2}"],
    "swin": [CONFIG + "{model_type:swin,image_size:32,patch_size:4,num_channels:1,embed_dim:8,depths:[1,1],num_heads:[1,2],"
             "window_size:4}"],
    "dinov2": [CONFIG + "{model_type:dinov2,image_size:32,patch_size:8,num_channels:1,hidden_size:16,num_hidden_layers:1,"
               "num_attention_heads:2}"],
}  # fmt: skip


def encoder(family="resnet", *overrides):
    torch.manual_seed(0)
    sizes = ["~model.backbone.config", *FAMILIES[family], "model.pixels.size=32", "model.head.dim=6"]
    return build(composed("model=resnet_small", *sizes, *overrides).model)


def images(count=6, seed=0):
    return Images(torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 1, 32, 32), dtype=np.uint8)))


def files(count=6):
    for pixels in images(count).pixels[:, 0].numpy():
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "png")
        yield out.getvalue()


def gradients(made, inputs):
    made.zero_grad()
    weights = torch.arange(1.0, 1 + len(inputs) * made.dim).view(len(inputs), made.dim)
    (made(inputs) * weights).sum().backward()
    return {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_any_backbone_gives_vectors_and_every_weight_learns(family):
    made = encoder(family)
    assert made(images()).shape == (6, 6)
    found = gradients(made, images())
    assert found.keys() == {name for name, p in made.named_parameters() if p.requires_grad}
    assert all(x.isfinite().all() for x in found.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_and_recomputation_change_nothing(family):
    whole, cut = encoder(family, "model.norm=group"), encoder(family, "model.norm=group")
    cut.execution = Execution("padded", "torch", None, 2, True)
    assert not whole.mixes_rows()
    torch.testing.assert_close(cut(images()), whole(images()), rtol=1e-5, atol=1e-6)
    expected, got = gradients(whole, images()), gradients(cut, images())
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-4 * float(value.abs().max() + 1), msg=name)


@pytest.mark.parametrize(("norm", "mixes"), [("keep", True), ("group", False), ("frozen", False)])
def test_only_batch_normalization_mixes_rows(norm, mixes):
    made = encoder("resnet", f"model.norm={norm}").train()
    assert made.mixes_rows() is mixes
    alone, together = made(Images(images().pixels[:2])), made(images())[:2]
    assert torch.allclose(alone, together, atol=1e-5) is not mixes
    assert not made.eval().mixes_rows()


@pytest.mark.parametrize("pooling", ["mean", "max", "cls"])
def test_pooling(pooling):
    made = encoder("vit", f"model.pooling={pooling}").eval()
    tokens = made.backbone(pixel_values=(images().pixels / 255 - 0.5) / 0.25).last_hidden_state
    pooled = {"mean": tokens.mean(1), "max": tokens.amax(1), "cls": tokens[:, 0]}[pooling]
    torch.testing.assert_close(made(images()), torch.nn.functional.normalize(made.head(pooled), dim=-1))


def test_files_and_pixels_are_the_same_images():
    made = encoder().eval()
    data = list(files())
    torch.testing.assert_close(CachedEncoder(made)(data), made.run(images(), Execution()))
    calls, inputs = [], made.prepare
    made.prepare = lambda items: calls.extend(items) or inputs(items)
    encode = CachedEncoder(made, batch_size=4)
    torch.testing.assert_close(encode([*data, data[0]])[-1], encode(data[:1])[0])
    assert sorted(calls) == sorted(set(data))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("norm", ["keep", "group"])
def test_a_folder_and_a_checkpoint_give_the_same_vectors(tmp_path, family, norm):
    made = encoder(family, f"model.norm={norm}")
    made(images())  # moves running statistics
    made.eval()
    expected = made(images())
    save_model(made, tmp_path / "model")
    opened, known = load_folder(str(tmp_path / "model"))
    assert "records" in known
    torch.testing.assert_close(opened.eval()(images()), expected)
    assert opened.settings() == made.settings()
    state = {f"encoder.{name}": x for name, x in made.state_dict().items()}
    torch.save({"state_dict": state, KEY: encoder_spec(made), "pytorch-lightning_version": "2"}, tmp_path / "last.ckpt")
    torch.testing.assert_close(load_checkpoint_encoder(tmp_path / "last.ckpt").eval()(images()), expected)


@pytest.mark.parametrize(
    ("family", "override", "message"),
    [
        ("resnet", "model.pixels.channels=3 model.pixels.mean=[0,0,0] model.pixels.std=[1,1,1]", "of 3 channels and 32 x 32"),
        ("vit", "model.pixels.size=40", r"does not take images.*40 x 40.*pixels.size"),
        ("resnet", "model.pooling=cls", "pooling=cls.*no such token.*pooling=mean"),
        ("convnext", "model.pooling=last", "pooling=last.*choose one of mean"),
        ("resnet", "model.norm=batch", "norm=batch.*keep, group, frozen"),
        ("resnet", "model.pixels.std=[0]", r"std=\[0\].*above 0"),
        ("resnet", "model.pixels.size=4", "size=4: at least 8"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_explained(family, override, message):
    with pytest.raises(Exception) as caught:
        encoder(family, *override.split())
    assert isinstance(caught.value.__cause__ or caught.value, InputError)
    import re

    assert re.search(message, str(caught.value.__cause__ or caught.value))


def test_texts_and_broken_files_are_refused():
    made = encoder()
    with pytest.raises(InputError, match="reads images, but was given text"):
        CachedEncoder(made)(TEXTS)
    with pytest.raises(InputError, match="An image of 5 bytes cannot be used"):
        CachedEncoder(made)([b"image"])
