"""Views in models: tokens that are cut do not matter, and views that a model cannot use are refused at once."""

import pytest
import torch
from hydra.errors import InstantiationException

from tercet.app.components import build
from tercet.models import Execution
from tercet.models.engine.deterministic_dropout import with_dropout_seeds
from tercet.models.text import word_starts
from tercet.rng import derive_seed
from tercet.types import Batch, TokenBatch, TokenState
from tercet.views import FeatureCutoff, Shuffle, SpanCutoff, TokenCutoff, TokenInfo
from tests.conftest import TEXTS, TOKENIZER, choices, composed, tiny
from tests.laws.test_encoding import FAMILIES, encoder_of

PART = f"+model.tokenizer={{_target_:tercet.models.load_tokenizer,name:'{TOKENIZER}'}}"
GRU = ["model=gru", "~model.tokenizer", PART, "model.backbone.hidden_size=8", "model.backbone.trained_dim=6"]


def encoder(family):
    torch.manual_seed(0)
    return build(composed(*FAMILIES[family], "model.backbone.dropout=0").model).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_token_is_not_seen(family):
    model = encoder(family)
    pieces = TokenInfo(*model.token_info())
    rows = model.prepare(TEXTS)
    out = TokenCutoff(0.5)(rows, derive_seed(torch.zeros(12, dtype=torch.long), torch.arange(12)), pieces)
    keep = out.state.keep
    other = TokenBatch(torch.where(keep, rows.ids, 2000), rows.lengths, out.state)
    assert not keep.all()
    torch.testing.assert_close(model(other), model(out))
    assert not torch.allclose(model(rows), model(out))


@pytest.mark.parametrize("family", FAMILIES)
def test_places_as_they_are_change_nothing_and_others_do(family):
    model = encoder_of(family).eval()  # of weights as they are drawn, attention is even: places hardly matter
    rows = model.prepare(TEXTS)
    same = TokenBatch(rows.ids, rows.lengths, TokenState(position=rows.index.position))
    torch.testing.assert_close(model(same), model(rows))
    out = Shuffle()(rows, torch.arange(12), TokenInfo(*model.token_info()))
    assert not torch.allclose(model(out), model(rows), atol=1e-3)


def layouts(model):
    made = [Execution("padded", "torch"), Execution("sorted", "torch", 30), Execution("equal_length", "torch")]
    return made + [Execution("packed", "torch"), Execution("packed", "torch", 20)] * (not model.runner.cannot_pack)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("view", [TokenCutoff(0.4, "shen"), SpanCutoff(0.4, "shen"), FeatureCutoff(0.4, "shen")], ids=str)
def test_cutoff_as_published_is_the_same_in_every_layout(family, pooling, view):
    model = encoder_of(family, f"model.pooling={pooling}").eval()
    rows = model.prepare(TEXTS)
    both = TokenBatch.concat([rows, view(rows, torch.arange(12), TokenInfo(*model.token_info()))])
    plain, want = model.run(both, layouts(model)[0]).chunk(2)
    torch.testing.assert_close(plain, model(rows), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(want, plain, atol=1e-3)
    for execution in layouts(model)[1:]:
        torch.testing.assert_close(model.run(both, execution), torch.cat([plain, want]), rtol=1e-5, atol=1e-5)


def test_cutoff_as_published_is_attention_without_the_tokens():
    """Written out with transformers' model: the embedding layer's output is cut, and the attention mask."""
    model = encoder_of("bert").eval()
    bert, rows, info = model.backbone, model.prepare(TEXTS[:1]), TokenInfo(*model.token_info())
    attend = TokenCutoff(0.4, "shen")(rows, torch.tensor([3]), info).state.attend
    assert 0 < (~attend).sum() <= int(0.4 * len(rows.ids))
    x = bert.embeddings(input_ids=rows.ids[None]) * attend[:, None]
    far = torch.where(attend, 0.0, torch.finfo(torch.float32).min)[None, None, None]
    for layer in bert.encoder.layer:
        x = layer(x, far)
    got = model(TokenBatch(rows.ids, rows.lengths, TokenState(attend=attend)))
    torch.testing.assert_close(got, x.mean(1), rtol=1e-5, atol=1e-5)


def test_dropout_by_seed_does_not_see_cut_tokens_either():
    model = encoder_of("bert", "model.execution.dropout=deterministic").train()
    ids = torch.arange(12)
    rows = with_dropout_seeds(Batch((model.prepare(TEXTS),), ids, ids, ids, ids[None]), 1, 2).views[0]
    rows = TokenCutoff(0.4, "shen")(rows, ids, TokenInfo(*model.token_info()))
    want = model.run(rows, Execution("padded", "deterministic"))
    torch.testing.assert_close(model.run(rows, Execution("packed", "deterministic")), want, rtol=1e-4, atol=1e-4)


def test_published_feature_cutoff_zeroes_a_fixed_number_of_columns_after_normalization():
    model = encoder_of("bert").eval()
    seen = []
    model.backbone.encoder.register_forward_pre_hook(lambda module, args, kwargs: seen.append(args[0]), with_kwargs=True)
    rows = FeatureCutoff(0.4, "shen")(model.prepare(TEXTS), torch.arange(12), TokenInfo(*model.token_info()))
    model.run(rows, Execution("padded", "torch"))
    zero = [(seen[0][row, :n] == 0).all(0) for row, n in enumerate(rows.lengths.tolist())]
    assert all(torch.equal((seen[0][row, :n] == 0).any(0), zero[row]) for row, n in enumerate(rows.lengths.tolist()))
    counts = [int(columns.sum()) for columns in zero]
    assert max(counts) <= int(0.4 * 32) and min(counts) >= 6 and len({tuple(columns.tolist()) for columns in zero}) == 12


def test_feature_cutoff_zeroes_columns_of_the_whole_row():
    model = encoder("bert")
    rows = model.prepare(TEXTS)
    seen = []
    model.backbone.embeddings.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    model.execution = Execution("padded", "torch", None, None, False)
    model(FeatureCutoff(0.5)(rows, torch.arange(12), TokenInfo(*model.token_info())))
    x = seen[0]
    for row, n in enumerate(rows.lengths.tolist()):
        zero = (x[row, :n] == 0).all(0)
        assert ((x[row, :n] == 0) == zero).all()
        assert 4 <= zero.sum() <= 28
    assert len({tuple((x[row, :1] == 0).all(0).tolist()) for row in range(12)}) == 12


# Views that rephrase give tokens alone, from files of their own: test_rephrasing.py.
@pytest.mark.parametrize("name", sorted(set(choices("view")) - {"synonyms", "mlm_replace"}))
@pytest.mark.parametrize("family", ["bert", "gru"])
def test_what_travels_with_tokens_survives_any_chunks(name, family):
    torch.manual_seed(0)
    overrides = tiny("model.backbone.dropout=0") if family == "bert" else GRU
    if family == "gru" and name in ("shuffle", "mixed"):
        pytest.skip("a recurrent encoder takes no positions")
    model = build(composed(*overrides).model).eval()
    views = build(composed(f"view={name}", "objective=simcse_unsup").view)
    looks = views(model.prepare(TEXTS), torch.arange(12), 3, TokenInfo(*model.token_info()))
    both = TokenBatch.concat(looks)
    model.execution = Execution("padded", "torch", None, None, False)
    expected = torch.cat([model(look) for look in looks])
    model.execution = Execution("sorted", "torch", 30, None, False)
    torch.testing.assert_close(model(both), expected, rtol=1e-5, atol=1e-5)
    assert name in ("dropout",) or not torch.allclose(*expected.split(12), atol=1e-4)


@pytest.mark.parametrize(
    "overrides, message",
    [
        ([*GRU, "view=shuffle"], "shuffles tokens: WordModel takes no positions"),
        ([*GRU, "view=span_cutoff", "view.second.0.variant=shen"], "variant shen: WordModel has no embedding layer with norm"),
        (["model=resnet_small", "view=token_cutoff"], "the model reads images. Leave out"),
    ],
)
def test_a_view_that_a_model_cannot_have_is_named_before_training(overrides, message):
    with pytest.raises(InstantiationException, match=message):
        build(composed("objective=simcse_unsup", *overrides).objective)


def test_words_begin_where_the_tokenizer_says():
    model = encoder("bert")
    ids = model.prepare(["unbelievable harps"]).ids
    tokens = model.tokenizer.convert_ids_to_tokens(ids.tolist())
    begins = word_starts(model.tokenizer)[ids].tolist()
    assert begins == [not t.startswith("##") for t in tokens] and False in begins
