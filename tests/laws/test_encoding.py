"""Laws 5 and 6: embeddings and gradients do not depend on how rows run through the network."""

from dataclasses import replace

import pytest
import torch
from omegaconf import OmegaConf

from tercet.app.components import build
from tercet.models import Execution
from tercet.models.engine.deterministic_dropout import with_dropout_seeds
from tercet.models.pooling import POOLINGS, WORD_ONLY_POOLINGS
from tercet.types import Batch, TokenBatch
from tests.conftest import NEEDED, TEXTS, TOKENIZER, VOCABULARY, choices, composed, tiny


def from_scratch(kind, **config):
    values = ",".join(f"{name}:{value}" for name, value in {"model_type": kind, **config}.items())
    return ["model=bert_small", f"model.tokenizer.name={TOKENIZER}", "~model.backbone.config",
            f"+model.backbone.config={{{values}}}"]  # fmt: skip


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
FAMILIES = {
    "bert": tiny(),
    "roberta": from_scratch("roberta", **SMALL, vocab_size=VOCABULARY, max_position_embeddings=130, pad_token_id=0),
    "distilbert": from_scratch("distilbert", dim=32, n_layers=2, n_heads=2, hidden_dim=64),
    "electra": from_scratch("electra", **SMALL, embedding_size=16),
    "modernbert": from_scratch("modernbert", **SMALL, vocab_size=VOCABULARY, pad_token_id=0, local_attention=6,
                               global_attn_every_n_layers=2, attention_dropout=0.1, mlp_dropout=0.1),
    "mpnet": from_scratch("mpnet", **SMALL),
}  # fmt: skip
PACKS = set(FAMILIES) - {"mpnet"}  # transformers' MPNet does not use the attention interface
CUTS = PACKS - {"modernbert"}  # its query, key and value are one projection


def batch_of(module, columns):
    # No text twice: which of two equal negatives is mined would be up to rounding.
    views = tuple(module.encoder.prepare([f"{text} {'again ' * v}" for text in TEXTS]) for v in range(columns))
    n = len(TEXTS)
    content = torch.arange(columns * n).view(columns, n)
    return Batch(views, torch.arange(n), torch.arange(n) % 3 - 1, torch.arange(n), content)


def gradients(module, batch, seed):
    torch.manual_seed(seed)
    module.train()
    module.zero_grad()
    module.training_step(batch, 0).backward()
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def objective(name, recompute, tokens, dropout_rate=0.1, mlm=0.1, layout="auto", dropout="auto"):
    torch.manual_seed(0)
    cfg = composed(
        *tiny(f"objective={name}", *NEEDED.get(name, ()))
    )  # composed once for all settings, which is faster than to give them as overrides
    execution = {"layout": layout, "dropout": dropout, "chunk_tokens": tokens, "recompute": recompute}
    settings = {f"model.execution.{key}": value for key, value in execution.items()}
    for key, value in {**settings, "model.backbone.dropout": dropout_rate, "objective.mlm.weight": mlm}.items():
        if OmegaConf.select(cfg, key.rsplit(".", 1)[0]) is not None:
            OmegaConf.update(cfg, key, value)
    return build(cfg.objective)


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
@pytest.mark.parametrize("name", choices("objective"))
@pytest.mark.parametrize("layout", ["padded", "sorted", "packed"])
@pytest.mark.parametrize("dropout", ["torch", "deterministic"])
@pytest.mark.parametrize("tokens", [None, 100])
def test_recomputed_gradients_are_the_plain_ones_with_dropout_on(name, layout, dropout, tokens):
    plain, again = (objective(name, recompute, tokens, layout=layout, dropout=dropout) for recompute in (False, True))
    batch = batch_of(plain, plain.columns[1])
    expected, got = gradients(plain, batch, 3), gradients(again, batch, 3)
    assert expected.keys() == got.keys()
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-5, atol=1e-7, msg=lambda m, n=key: f"{n}: {m}")
    plain.seed = 5
    other = gradients(plain, batch, 4)
    assert any(not torch.allclose(other[k], expected[k]) for k in expected), "dropout was off: nothing is shown"


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
@pytest.mark.parametrize("name", choices("objective"))
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_chunks_and_padding_do_not_change_the_gradient(name, dropout):
    """With dropout on too: masks are a function of the row, not of the chunk."""
    given = {"dropout_rate": dropout, "dropout": "deterministic"}
    whole = objective(name, False, None, layout="padded", **given)
    batch = batch_of(whole, whole.columns[1])
    expected = gradients(whole, batch, 0)
    for layout in ("sorted", "packed"):
        got = gradients(objective(name, True, 40, layout=layout, **given), batch, 0)
        for key, value in expected.items():
            torch.testing.assert_close(got[key], value, rtol=1e-4, atol=1e-6, msg=lambda m, n=key: f"{n}: {m}")


@pytest.mark.parametrize("recompute", [False, True])
def test_a_gradient_in_half_precision_is_as_exact_in_many_chunks_as_in_one(recompute):
    """Weights are cast to bfloat16, of which 256 gradients of equal size have no exact sum in bfloat16."""
    encoder = encoder_of("bert", "model.backbone.dropout=0")
    rows = encoder.prepare([f"{TEXTS[i % len(TEXTS)]} {i}" for i in range(256)])

    def gradient(half, **execution):
        encoder.execution = replace(encoder.execution, **execution)
        encoder.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            total = encoder(rows).float().sum()
        total.backward()
        return torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None])

    exact, once, often = gradient(False), gradient(True), gradient(True, chunk_rows=1, recompute=recompute)
    assert (once - exact).norm() > 1e-4 * exact.norm(), "nothing was computed in half precision"
    assert (often - exact).norm() <= 1.2 * (once - exact).norm()


def encoder_of(family, *overrides):
    torch.manual_seed(0)
    encoder = build(composed(*FAMILIES[family], *overrides).model)
    with torch.no_grad():  # so that tokens look at each other, not evenly around
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return encoder


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pooling", sorted(set(POOLINGS) - {"cls_pooler"} - WORD_ONLY_POOLINGS))
def test_rows_embed_together_as_they_do_alone(family, pooling):
    encoder = encoder_of(family, f"model.pooling={pooling}").eval()
    assert (encoder.execution.layout == "packed") == (family in PACKS)
    inputs = encoder.prepare(TEXTS)
    alone = torch.cat([encoder.run(inputs.select(torch.tensor([i])), padded()) for i in range(len(inputs))])
    expected = slopes(encoder, alone)
    plans = [padded(), Execution("sorted", "torch"), Execution("sorted", "torch", 30, None, False),
             Execution("padded", "torch", None, 2, False)]  # fmt: skip
    if family in PACKS:
        plans += [Execution("packed", "auto", tokens, rows, False) for tokens, rows in ((None, None), (30, None), (1, None))]
    for plan in plans:
        z = encoder.run(inputs, plan)
        torch.testing.assert_close(z, alone, rtol=1e-5, atol=1e-5)
        for name, slope in slopes(encoder, z).items():
            torch.testing.assert_close(slope, expected[name], rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def padded():
    return Execution("padded", "torch")


def slopes(encoder, z):
    """The gradient of a sum in which every row and column has its own weight."""
    encoder.zero_grad()
    (z * torch.linspace(-1, 1, z.numel()).view_as(z)).sum().backward(retain_graph=True)
    return {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", sorted(PACKS))
def test_a_packed_row_does_not_see_its_neighbors(family):
    encoder = encoder_of(family).eval()
    inputs = encoder.prepare(TEXTS)
    z = encoder(inputs)
    for row in range(len(inputs)):
        others = inputs.ids.clone()
        start = int(inputs.lengths[:row].sum())
        own = slice(start, start + int(inputs.lengths[row]))
        outside = torch.ones(len(others), dtype=torch.bool)
        outside[own] = False
        others[outside] = others[outside] % 1000 + 1500
        torch.testing.assert_close(encoder(TokenBatch(others, inputs.lengths))[row], z[row], rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", sorted(PACKS))
def test_the_last_layer_computes_first_tokens_only_where_no_others_are_read(family):
    seen = {}
    for pooling in ("cls", "mean"):
        encoder = encoder_of(family, f"model.pooling={pooling}")
        wide = next(m for m in reversed(list(encoder.backbone.modules())) if isinstance(m, torch.nn.LayerNorm))
        wide.register_forward_hook(lambda m, args, out, p=pooling: seen.update({p: out.shape[1]}))
        encoder(encoder.prepare(TEXTS))
    tokens = len(encoder.prepare(TEXTS).ids)
    assert seen == {"cls": len(TEXTS) if family in CUTS else tokens, "mean": tokens}


@pytest.mark.parametrize("family", sorted(PACKS))
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_deterministic_dropout_is_a_function_of_the_row(family, pooling):
    """The same for any layout, any chunks and any order of the rows; another for another seed, step, view and place."""
    encoder = encoder_of(family, f"model.pooling={pooling}", "model.execution.dropout=deterministic").train()
    batch = with_dropout_seeds(one_column(encoder), seed=1, step=7)
    rows = batch.views[0]
    z = encoder.run(rows, padded())
    for plan in (Execution("sorted", "deterministic", 30, None, True), Execution("packed", "deterministic", None, None, False),
                 Execution("packed", "deterministic", 20, None, True)):  # fmt: skip
        torch.testing.assert_close(encoder.run(rows, plan), z, rtol=1e-4, atol=1e-4)
    back = torch.arange(len(rows)).flip(0)
    torch.testing.assert_close(encoder(rows.select(back)), z[back], rtol=1e-4, atol=1e-4)
    for other in (with_dropout_seeds(one_column(encoder), 1, 8), with_dropout_seeds(one_column(encoder), 2, 7)):
        assert (encoder(other.views[0]) - z).abs().max() > 0.01
    twice = with_dropout_seeds(one_column(encoder).select_columns(0, 0), 1, 7)
    assert (encoder(twice.views[1]) - z).abs().max() > 0.01


def one_column(encoder):
    n = torch.arange(len(TEXTS))
    return Batch((encoder.prepare(TEXTS),), n, n, n, n[None])


def test_what_cannot_be_packed_is_said():
    for key in ("layout=packed", "dropout=deterministic"):
        with pytest.raises(Exception, match=f"execution.{key}: MPNetModel .* execution.{key[:6]}.*=auto"):
            encoder_of("mpnet", f"model.execution.{key}")
