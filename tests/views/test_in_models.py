"""Views in models: tokens that are cut do not matter, and views that a model cannot use are refused at once."""

import pytest
import torch
from hydra.errors import InstantiationException

from tercet.app.components import build
from tercet.models import Execution
from tercet.models.text import word_starts
from tercet.rng import derive_seed
from tercet.types import TokenBatch, TokenState
from tercet.views import FeatureCutoff, Shuffle, TokenCutoff, TokenInfo
from tests.conftest import MINILM, TEXTS, choices, composed, tiny
from tests.laws.test_encoding import FAMILIES, encoder_of

TOKENIZER = f"+model.tokenizer={{_target_:tercet.models.load_tokenizer,name:'{MINILM}'}}"
GRU = ["model=gru", "~model.tokenizer", TOKENIZER, "model.backbone.hidden_size=8", "model.backbone.trained_dim=6"]


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
    same = TokenBatch(rows.ids, rows.lengths, TokenState(position=rows.positions()))
    torch.testing.assert_close(model(same), model(rows))
    out = Shuffle()(rows, torch.arange(12), TokenInfo(*model.token_info()))
    assert not torch.allclose(model(out), model(rows), atol=1e-3)


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
