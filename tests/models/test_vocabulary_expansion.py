"""Vocabulary expansion with words that training has not seen."""

import pytest
import torch

from tercet.app.components import build
from tercet.data import TextFiles
from tercet.errors import InputError
from tercet.models.folder import load_folder, save_model
from tercet.models.vocabulary import expand_vocabulary
from tercet.models.words import WordVectors
from tests.conftest import TEXTS, composed, tiny

NEW = ["zebra", "Zebra", "new_york", "don't", "genome"]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(TEXTS * 2))
    return TextFiles(str(path), columns=["text"])


def made(source, model, *overrides):
    cfg = composed(f"model={model}", "data=text", f"data.path={source.path}", "data.columns=[text]", *overrides)
    cfg.data.train.split = "all"
    cfg.data.train.held_out = 0
    return build(cfg.model).eval()


def gru(source, *more):
    small = ["backbone.hidden_size=8", "backbone.trained_dim=6", "tokenizer.minimum=1"]
    return made(source, "gru", *(f"model.{key}" for key in small), *more)


def larger(part, columns=4):
    """Vectors of which the learned ones are a linear map and a constant, and some more words."""
    learned = part.backbone.config.trained_words
    words = [w for w, i in sorted(part.tokenizer.get_vocab().items(), key=lambda p: p[1]) if 2 <= i < learned]
    matrix = torch.randn(len(words) + len(NEW), columns)
    weight, bias = torch.randn(columns, 6), torch.randn(6)
    with torch.no_grad():
        part.backbone.embeddings.trained.weight[2:] = matrix[: len(words)] @ weight + bias
    return WordVectors([*words, *NEW], matrix), matrix @ weight + bias


def test_new_words_get_what_the_map_says_and_old_ones_stay(source):
    encoder = gru(source)
    vectors, truth = larger(encoder)
    before = encoder(encoder.prepare(TEXTS))
    wide, done = expand_vocabulary(encoder, vectors)
    torch.testing.assert_close(wide.eval()(wide.prepare(TEXTS)), before)
    table, place = wide.backbone.embeddings.trained.weight, wide.tokenizer.get_vocab()
    for word in ("zebra", "Zebra", "genome"):
        torch.testing.assert_close(table[place[word]], truth[vectors.words.index(word)], atol=1e-4, rtol=1e-4)
    assert done.new == 3 and done.fit == pytest.approx((1.0,)), "a phrase and a clitic can never be met"
    assert len(wide.prepare(["the zebra"]).ids) == 2 and wide.tokenizer.unk_token_id not in wide.prepare(["zebra"]).ids


def test_a_model_in_lower_case_takes_no_capitals(source):
    encoder = gru(source, "model.tokenizer.lowercase=true")
    vectors, _ = larger(encoder)
    wide, done = expand_vocabulary(encoder, vectors)
    assert done.new == 2 and torch.equal(wide.prepare(["Zebra"]).ids, wide.prepare(["zebra"]).ids)


def test_towers_are_mapped_each_by_itself_and_saved(source, tmp_path):
    small = ["f.backbone.hidden_size=8", "f.backbone.trained_dim=6", "f.tokenizer.minimum=1"]
    encoder = made(source, "towers", *(f"model.{key}" for key in small))
    vectors, _ = larger(encoder.f)
    wide, done = expand_vocabulary(encoder, vectors)
    assert len(done.fit) == 2 and done.fit[0] == pytest.approx(1.0) and done.fit[1] < 0.9
    save_model(wide, tmp_path / "wide")
    again, _ = load_folder(str(tmp_path / "wide"))
    texts = ["A zebra plays the harp.", *TEXTS]
    torch.testing.assert_close(again.eval()(again.prepare(texts)), wide.eval()(wide.prepare(texts)))
    torch.testing.assert_close(wide(wide.prepare(TEXTS)), encoder(encoder.prepare(TEXTS)))


def test_a_fixed_channel_keeps_its_rows_and_words_of_its_file_get_a_learned_one(source, tmp_path):
    path = tmp_path / "glove.txt"
    path.write_text("the 1 2 3\nzebra 4 5 6\nyak 7 8 9\n")
    encoder = gru(source, f"model.backbone.vectors={path}", f"model.tokenizer.vectors={path}")
    vectors, _ = larger(encoder)
    known = encoder.tokenizer.get_vocab()
    before = encoder(encoder.prepare(["The yak is here."]))
    wide, _ = expand_vocabulary(encoder, vectors)
    place, channels = wide.tokenizer.get_vocab(), wide.backbone.embeddings
    for word in ("the", "zebra", "yak"):
        assert torch.equal(channels.fixed.weight[place[word]], encoder.backbone.embeddings.fixed.weight[known[word]])
    assert channels.fixed.weight[place["genome"]].eq(0).all()
    assert place["zebra"] < channels.words <= place["yak"]
    torch.testing.assert_close(wide.eval()(wide.prepare(["The yak is here."])), before)


def test_what_cannot_be_expanded_is_named(source):
    with pytest.raises(InputError, match="learns no word vectors"):
        expand_vocabulary(build(composed(*tiny()).model), WordVectors(["a"], torch.ones(1, 2)))
    with pytest.raises(InputError, match=r"1 of their words are in the model's vocabulary; a map of 2 columns needs more"):
        expand_vocabulary(gru(source), WordVectors(["the", "zebra"], torch.ones(2, 2)))
