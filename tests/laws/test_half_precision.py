"""What surrounds a network in half precision is computed in float32: a result and a gradient are rounded once."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tercet.app.components import build
from tercet.images import PixelFormat
from tercet.losses import InfoNCE
from tercet.models import ImageEncoder, random_backbone
from tercet.models.engine.backbone_runner import _drawn_columns
from tercet.models.pooling import POOLINGS, WORD_ONLY_POOLINGS, LayeredHead
from tercet.training import MaskedLM
from tercet.types import RATE_SCALE
from tests.conftest import NEEDED, TEXTS, choices, composed, tiny
from tests.laws.test_encoding import batch_of, encoder_of

HALVES = [torch.bfloat16, torch.float16]
POOLED = sorted(set(POOLINGS) - {"cls_pooler", "final"})  # those two are a layer's output
LENGTHS = torch.tensor([257, 300, 389, 511])  # numbers that bfloat16 does not hold


def roundings(got, exact, dtype):
    """How many times as far ``got`` is from ``exact`` as ``exact`` rounded once."""
    return float((got.double() - exact).norm() / (exact.to(dtype) - exact).norm())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("pooling", POOLED)
def test_a_pooling_of_long_rows_rounds_once(pooling, dtype):
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(512) < LENGTHS[:, None]).long()
    size = 1 if pooling == "sum" else 300  # a few columns of real models are as large
    states = (size * torch.rand(3, len(mask), 512, 16, generator=generator)).to(dtype)
    weight = torch.randn(len(mask), 16, generator=generator)

    def pool(x):
        x = x.detach().requires_grad_()
        z = POOLINGS[pooling](SimpleNamespace(last_hidden_state=x[-1], hidden_states=tuple(x)), mask)
        (z.double() * weight).sum().backward()
        return z.detach(), x.grad

    (z, gradient), (exact, exact_gradient) = pool(states), pool(states.double())
    assert torch.equal(z.double(), exact) or roundings(z, exact, dtype) < 1.2
    assert roundings(gradient, exact_gradient, dtype) < 2  # that of the result is rounded, and then that of the states


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_unit_vectors_have_the_length_1_and_a_row_of_zeros_is_finite(encoder, dtype):
    states = torch.cat([torch.randn(3, 1, encoder.dim) * 1000, torch.zeros(1, 1, encoder.dim)]).to(dtype)
    encoder.normalize = True
    z = encoder.pool(SimpleNamespace(last_hidden_state=states), torch.ones(4, 1, dtype=torch.long))
    torch.testing.assert_close(z.norm(dim=1), torch.tensor([1.0, 1, 1, 0]))
    layer = LayeredHead([{"type": "Normalize"}])
    layer.build(encoder.dim, 0.02)
    torch.testing.assert_close(layer(states[:, 0]).float(), z, atol=2e-3, rtol=1e-2)


def logged_and_gradient(module, batch, z, half):
    """What a step logs, and the gradient of the embeddings, which are ``z``."""
    logged, leaf = {}, z.detach().requires_grad_()
    module.encoder.forward = lambda rows: leaf[: len(rows)]
    module.log_training = lambda values, _: logged.update(values)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        value = module.training_step(batch, 0)
    value.backward()
    return logged, leaf.grad


@pytest.mark.parametrize("memory", [0, 9])
@pytest.mark.parametrize("spread", [1.0, 0.03])
@pytest.mark.parametrize("name", [name for name in choices("objective") if name != "mlm"])
def test_losses_and_statistics_of_half_embeddings_are_those_of_float32(name, spread, memory):
    cfg = composed(*tiny(f"objective={name}", *NEEDED.get(name, ())))
    if "memory" in cfg.objective:
        cfg.objective.memory = {"_target_": cfg.objective.memory._target_, "size": memory, "warmup": 0}
    elif memory:
        return
    found = {}
    for half in (False, True):
        torch.manual_seed(0)
        module = build(cfg.objective)
        batch = batch_of(module, module.columns[1])
        batch = replace(batch, label=batch.position // 4)  # also neighbors in a document
        rows = len(module.prepare(batch).inputs)
        for step in (0, 100):  # the first fills the memory
            now = replace(batch, example_id=batch.example_id + step, content_hash=batch.content_hash + step)
            z = (torch.randn(1, module.encoder.dim) + spread * torch.randn(rows, module.encoder.dim)).bfloat16()
            found[half] = logged_and_gradient(module, now, z if half else z.float(), half)
    (logged, gradient), (exact_logged, exact) = found[True], found[False]
    torch.testing.assert_close(logged, exact_logged, rtol=1e-4, atol=1e-6)
    assert exact.any() and roundings(gradient, exact.double(), torch.bfloat16) < 1.1


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_what_is_drawn_at_random_is_float32_where_half_precision_is_the_default(encoder, dtype):
    """As it is in a pass with the trainer's precision bf16-true or 16-true."""
    head, ids = MaskedLM(weight=0.1).build(encoder), torch.randint(1000, 2000, (100_000,))
    cutoff = torch.stack([torch.arange(5), torch.full((5,), RATE_SCALE // 5)], 1)[None]
    expected = _drawn_columns(cutoff, 64)
    torch.set_default_dtype(dtype)
    try:
        corrupted, targets = head.corrupt(ids)
        columns = _drawn_columns(cutoff, 64)
    finally:
        torch.set_default_dtype(torch.float32)
    random = corrupted[(targets >= 0) & (corrupted != ids) & (corrupted != head.mask_id)]
    assert len(random.unique()) > 0.75 * len(random), "of half precision a few hundred tokens could be drawn"
    assert torch.equal(columns, expected)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_pixels_are_normalized_in_float32(dtype):
    sizes = {"embedding_size": 8, "hidden_sizes": [8], "depths": [1], "layer_type": "basic"}
    backbone, seen = random_backbone({"model_type": "resnet", "num_channels": 1, **sizes}), []
    encoder = ImageEncoder(backbone, PixelFormat(32, 1, mean=[0.5], std=[0.25]), norm="group").to(dtype)
    backbone.register_forward_pre_hook(lambda m, a, given: seen.append(given["pixel_values"]), with_kwargs=True)
    pixels = torch.arange(256, dtype=torch.uint8).repeat(4).view(1, 1, 32, 32)
    encoder.embed(pixels)
    assert torch.equal(seen[0], ((pixels.float() / 255 - 0.5) / 0.25).to(dtype))


@pytest.mark.parametrize("pooling", sorted(set(POOLED) - WORD_ONLY_POOLINGS))
def test_a_gradient_under_autocast_is_as_exact_as_that_of_transformers(pooling):
    encoder = encoder_of("bert", f"model.pooling={pooling}", "model.backbone.dropout=0")
    rows = encoder.prepare(TEXTS)
    ids, mask, _ = rows.pad(0)

    def plain():
        return POOLINGS[pooling](encoder.backbone(ids, attention_mask=mask, output_hidden_states=True), mask)

    def error_of_gradient(embed):
        found = []
        for half in (False, True):
            encoder.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                value = InfoNCE()(*embed().chunk(2))
            value.backward()
            found.append(torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None]))
        return float((found[1] - found[0]).norm())

    ours = error_of_gradient(lambda: encoder(rows))
    encoder.backbone.set_attn_implementation("sdpa")
    assert 0 < ours < 1.25 * error_of_gradient(plain)
