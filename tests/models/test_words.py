"""Word-level encoders: vocabulary, vectors, recurrence, two encoders side by side."""

import pytest
import torch
from safetensors.torch import save_file

from tercet.app.components import build
from tercet.data import TextFiles
from tercet.errors import InputError
from tercet.models.folder import KEY, encoder_spec, load_checkpoint_encoder, load_folder, save_model
from tercet.models.vocabulary import word_tokenizer
from tercet.models.words import read_vectors, word_backbone
from tests.conftest import TEXTS, composed, tiny


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(TEXTS * 2))
    return TextFiles(str(path), columns=["text"])


@pytest.fixture
def glove(tmp_path):
    path = tmp_path / "glove.txt"
    path.write_text("".join(f"{word} {i} {i + 0.5} -{i}\n" for i, word in enumerate(["the", "harp", "zebra", "a b", "."], 1)))
    return str(path)


def config(source, *overrides, model="gru"):
    cfg = composed(f"model={model}", "data=text", f"data.path={source.path}", "data.columns=[text]", *overrides)
    cfg.data.train.split = "all"
    cfg.data.train.held_out = 0
    return cfg.model


SMALL = ["model.backbone.hidden_size=8", "model.backbone.trained_dim=6", "model.tokenizer.minimum=1"]


def towers(source):
    return build(config(source, "model.f.backbone.hidden_size=8", "model.f.backbone.trained_dim=6", model="towers"))


def test_words_are_counted_and_cut_as_treebank_does(source):
    tokenizer = word_tokenizer(source, 10, 2)
    assert len(tokenizer) == 12
    assert tokenizer.get_vocab()["."] == 2, "the most frequent word comes first"

    def cut(text):
        return [word for word, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]

    assert cut("Don't stop, it's John's") == ["Do", "n't", "stop", ",", "it", "'s", "John", "'s"]
    assert cut("do n't it 's") == ["do", "n't", "it", "'s"]
    assert word_tokenizer(source, 1000, 1, True, None).get_vocab().keys() >= {"the", "nobody"}
    assert "Nobody" not in word_tokenizer(source, 1000, 1, True, None).get_vocab()
    assert "sea" not in word_tokenizer(source, 1000, 3, True, None).get_vocab()
    assert tokenizer("Xylophone.", return_attention_mask=False)["input_ids"] == [0, 2]


def test_glove_is_read_and_words_may_hold_spaces(glove):
    known = read_vectors(glove)
    assert known.words == ["the", "harp", "zebra", "a b", "."]
    assert known.matrix[2].tolist() == [3.0, 3.5, -3.0]


def test_word2vecs_header_and_a_folder_are_read(tmp_path):
    (tmp_path / "w2v.txt").write_text("2 3\nx 1 2 3\ny 4 5 6\n")
    assert read_vectors(str(tmp_path / "w2v.txt")).matrix.tolist() == [[1, 2, 3], [4, 5, 6]]
    save_file({"embeddings": torch.eye(2).half()}, tmp_path / "embeddings.safetensors")
    (tmp_path / "vocab.txt").write_text("x\ny\n")
    assert read_vectors(str(tmp_path)).words == ["x", "y"]


def test_the_shared_glove_is_read(shared):
    assert read_vectors("../models/glove-6b-50d").matrix.shape == (150_000, 50)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a 1 2\nb 1\n", "line 2: a word and 2 numbers are needed.*'b 1'"),
        ("a 1 2\nb 1 x\n", "line 2"),
        ("a 1 2\nb 1 nan\n", "line 2"),
        ("a 1 2\nb 1 2 3\n", "line 2: a word and 2 numbers are needed.*'b 1 2 3'"),
        ("a 1\nb 1 2\n", "line 2"),
        ("", "is empty"),
        (None, "does not exist"),
    ],
)
def test_broken_vectors_are_named(tmp_path, text, message):
    path = tmp_path / "v.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_vectors(str(path), "vectors")


def test_a_folder_of_unequal_sizes_is_named(tmp_path):
    save_file({"embeddings": torch.eye(3)}, tmp_path / "embeddings.safetensors")
    (tmp_path / "vocab.txt").write_text("x\ny\n")
    with pytest.raises(InputError, match=r"2 words, embeddings.safetensors holds embeddings \(3, 3\)"):
        read_vectors(str(tmp_path))


def test_a_word_that_comes_again_is_said(tmp_path, caplog):
    (tmp_path / "v.txt").write_text("x 1\ny 2\nx 3\n")
    assert read_vectors(str(tmp_path / "v.txt")).matrix.tolist() == [[1], [2]]
    assert "1 words occur more than once" in caplog.text


@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize("both", [False, True])
def test_the_final_state_is_the_one_of_each_direction(source, cell, both):
    """Against one row at a time and the plain cell."""
    encoder = build(config(source, *SMALL, f"model.backbone.cell={cell}", f"model.backbone.bidirectional={both}")).eval()
    inputs = encoder.prepare(TEXTS)
    z = encoder(inputs)
    for row, got in zip(inputs.rows(), z, strict=True):
        states, _ = encoder.backbone.recurrent(encoder.backbone.embeddings(row[None]))
        expected = torch.cat([states[0, -1, :4], states[0, 0, 4:]]) if both else states[0, -1]
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("pooling", ["mean", "sum", "max"])
def test_a_bag_of_words_is_that_of_its_rows(source, glove, pooling):
    options = ["model.backbone.trained_dim=6", "model.tokenizer.minimum=1", f"model.backbone.vectors={glove}"]
    encoder = build(config(source, *options, f"model.tokenizer.vectors={glove}", f"model.pooling={pooling}", model="bag"))
    inputs = encoder.prepare(TEXTS)
    table = encoder.backbone.embeddings
    for row, got in zip(inputs.rows(), encoder(inputs), strict=True):
        x = torch.cat([table.trained.weight[row], table.fixed.weight[row]], 1)
        expected = {"mean": x.mean(0), "sum": x.sum(0), "max": x.amax(0)}[pooling]
        torch.testing.assert_close(got, expected)


def test_a_word_known_from_vectors_only_has_no_learned_row(source, glove):
    encoder = build(config(source, *SMALL, f"model.backbone.vectors={glove}", f"model.tokenizer.vectors={glove}"))
    zebra, harp = encoder.tokenizer.convert_tokens_to_ids(["zebra", "harp"])
    x = encoder.backbone.embeddings(torch.tensor([zebra, harp, 0]))
    assert x[0, 6:].tolist() == [3.0, 3.5, -3.0]
    assert torch.equal(x[0, :6], x[2, :6]), "the learned channel sees an unknown word"
    assert not torch.equal(x[1, :6], x[2, :6])
    assert not encoder.backbone.embeddings.fixed.weight.requires_grad


@pytest.mark.parametrize("make", ["gru", "towers", "heads"])
def test_a_folder_and_a_checkpoint_give_the_same_vectors(source, tmp_path, make):
    made = {
        "gru": lambda: build(config(source, *SMALL)),
        "towers": lambda: towers(source),
        "heads": lambda: build(composed(*tiny("model.head.kind=two_mlp", "model.head.dim=5", "model.normalize=true")).model),
    }
    encoder = made[make]().eval()
    z = encoder(encoder.prepare(TEXTS))
    save_model(encoder, tmp_path / "model")
    again, _ = load_folder(str(tmp_path / "model"))
    torch.testing.assert_close(again.eval()(again.prepare(TEXTS)), z)
    assert (again.num_outputs, again.dim) == (encoder.num_outputs, encoder.dim)
    state = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    torch.save({KEY: encoder_spec(encoder), "state_dict": state}, tmp_path / "x.ckpt")
    again = load_checkpoint_encoder(tmp_path / "x.ckpt").eval()
    torch.testing.assert_close(again(again.prepare(TEXTS)), z)


def test_each_output_is_normalized_alone():
    encoder = build(composed(*tiny("model.head.kind=two_linear", "model.head.dim=5", "model.normalize=true")).model)
    z = encoder(encoder.prepare(TEXTS)).unflatten(1, (2, 5))
    torch.testing.assert_close(z.norm(dim=2), torch.ones(len(TEXTS), 2))


def test_towers_share_nothing_but_pretrained_words(source, glove):
    two = towers(source)
    assert not torch.equal(*(tower.backbone.embeddings.trained.weight for tower in (two.f, two.g)))
    options = [f"model.f.backbone.vectors={glove}", f"model.f.tokenizer.vectors={glove}"]
    two = build(config(source, *options, model="towers"))
    assert two.f.backbone.embeddings.fixed.weight is two.g.backbone.embeddings.fixed.weight
    z = two(two.prepare(TEXTS))
    assert torch.equal(z, torch.cat([two.f(two.prepare(TEXTS)), two.g(two.prepare(TEXTS))], 1))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.backbone.cell=rnn"], "cell=rnn: choose one of gru, lstm, bag"),
        (["model.backbone.hidden_size=7"], "hidden_size=7: an even number"),
        (["model.backbone.cell=bag"], "cell=bag has no state"),
        (["model.backbone.trained_dim=0"], "trained_dim=0: above 0, or"),
        (["model.backbone.dropout=1.0"], "dropout=1.0: a rate"),
        (["model.pooling=cls"], "pooling=cls: for a word-level encoder choose one of final"),
        (["model.tokenizer.source=null"], "source is null: then the words come from vectors"),
        (["model.tokenizer.minimum=99"], "minimum=99: no word occurs so often"),
    ],
)
def test_what_cannot_be_is_explained(source, overrides, message):
    with pytest.raises(Exception, match=message):
        build(config(source, *SMALL, *overrides))


def test_vectors_that_share_no_word_are_named(source, tmp_path):
    (tmp_path / "v.txt").write_text("qqq 1 2\n")
    with pytest.raises(InputError, match="none of its words is in the vocabulary"):
        word_backbone(word_tokenizer(source, 10, 1, False, None), "bag", None, False, 3, str(tmp_path / "v.txt"))


def test_final_needs_recurrence():
    with pytest.raises(Exception, match=r"pooling=final: BertModel is not recurrent"):
        build(composed(*tiny("model.pooling=final")).model)


def test_word_vectors_begin_as_the_authors(source):
    weight = build(config(source, *SMALL)).backbone.embeddings.trained.weight.detach()
    assert weight.abs().max() <= 0.1 and float(weight.std()) == pytest.approx(0.2 / 12**0.5, rel=0.1)
