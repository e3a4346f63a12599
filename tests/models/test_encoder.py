"""Encoding of texts: modes, caching, pooling, folders, and agreement with sentence-transformers."""

import pytest
import torch

from tercet.app.components import build
from tercet.errors import InputError
from tercet.models import CachedEncoder, Head, TextEncoder, load_backbone, load_tokenizer, make_tokenizer, random_backbone
from tercet.models import encoder as module
from tercet.models.folder import load_folder, save_model
from tercet.models.pooling import POOLINGS, WORD_ONLY_POOLINGS
from tercet.types import TokenBatch
from tests.conftest import MINILM, TEXTS, TINY, composed, tiny
from tests.laws.device_operations import do_as_on_a_gpu


@pytest.fixture(scope="module")
def minilm():
    return build(composed("model=minilm").model)


def test_a_pretrained_encoder_trains_with_dropout(minilm):
    assert all(m.training for m in minilm.modules()), "transformers hands out models in evaluation mode"
    inputs = minilm.prepare(TEXTS[:2])
    assert not torch.allclose(minilm(inputs), minilm(inputs))
    assert minilm.has_dropout()


def test_encoding_drops_nothing_and_puts_the_mode_back(minilm):
    minilm.train()
    first, second = (CachedEncoder(minilm)(TEXTS) for _ in range(2))
    torch.testing.assert_close(first, second)
    assert all(m.training for m in minilm.modules())
    frozen = minilm.backbone.embeddings.LayerNorm.eval()
    assert CachedEncoder(minilm).num_outputs == 1 and len(CachedEncoder(minilm)(TEXTS)) == len(TEXTS)
    assert [m for m in minilm.modules() if not m.training] == [frozen]
    minilm.train()


def test_each_text_is_encoded_once(encoder, monkeypatch):
    encoding, seen = CachedEncoder(encoder), []
    inputs = encoder.prepare
    monkeypatch.setattr(encoder, "prepare", lambda texts: seen.extend(texts) or inputs(texts))
    z = encoding([*TEXTS, *TEXTS[:3], TEXTS[0]])
    encoding(TEXTS[:2])
    assert sorted(seen) == sorted(TEXTS)
    torch.testing.assert_close(z[:3], z[12:15])


@pytest.mark.parametrize("held", [1, 3, 100])
def test_a_gpu_encodes_in_blocks_whose_vectors_are_copied_a_few_at_a_time(encoder, held, monkeypatch):
    texts = [f"{text} {'again ' * (i % 5)}{i}" for i, text in enumerate(5 * TEXTS)]
    expected, on_device = encoder.encode(texts), []
    monkeypatch.setattr(module, "BLOCK", 7)
    monkeypatch.setattr(module, "HELD", held)
    do_as_on_a_gpu(monkeypatch)
    run = encoder.run
    monkeypatch.setattr(encoder, "run", lambda *a: on_device.append(z := run(*a)) or z)
    torch.testing.assert_close(encoder.encode(texts[::-1]).flip(0), expected, rtol=1e-5, atol=1e-6)
    assert len(on_device) == -(-len(texts) // 7)


def test_the_vectors_are_those_of_sentence_transformers(minilm):
    from sentence_transformers import SentenceTransformer

    from tercet.models.pretrained import resolve_source

    theirs = torch.tensor(SentenceTransformer(resolve_source(MINILM), device="cpu").encode(TEXTS))
    torch.testing.assert_close(CachedEncoder(minilm)(TEXTS), theirs, rtol=0, atol=1e-5)


HEADS = [("none", None, False), ("linear", 8, False), ("mlp", None, False), ("mlp", 8, True)]


@pytest.mark.parametrize("pooling", sorted(set(POOLINGS) - WORD_ONLY_POOLINGS))
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_the_folder_opens_elsewhere_with_the_same_vectors(tmp_path, pooling, head):
    from sentence_transformers import SentenceTransformer

    encoder = build(composed(*tiny(f"model.pooling={pooling}", f"model.normalize={str(head[0] == 'none').lower()}")).model)
    if head[0] != "none":
        encoder = TextEncoder(encoder.backbone, encoder.tokenizer, pooling, Head(*head), False, 64, encoder.execution)
    save_model(encoder, tmp_path)
    ours = CachedEncoder(encoder)(TEXTS)
    theirs = torch.tensor(SentenceTransformer(str(tmp_path), device="cpu").encode(TEXTS))
    again, known = load_folder(str(tmp_path))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    torch.testing.assert_close(CachedEncoder(again)(TEXTS), ours, rtol=0, atol=1e-6)
    assert known == "as the folder records"
    assert again.pooling == pooling


def pool_by_row(pooling, states, mask):
    """The pooling of one row at a time, written out."""
    out = []
    for i, row in enumerate(mask.bool()):
        layer = {"first_last": 1, "static_last": 0, "top_two": -2}.get(pooling, -1)
        hidden = (states[layer][i][row] + states[-1][i][row]) / 2
        weighted = sum((t + 1) * h for t, h in enumerate(hidden)) / sum(range(1, len(hidden) + 1))
        picked = {"cls": hidden[0], "max": hidden.max(0).values, "last": hidden[-1], "weighted_mean": weighted}
        out.append(picked.get(pooling, hidden.mean(0)))
    return torch.stack(out)


@pytest.mark.parametrize("pooling", sorted(set(POOLINGS) - {"cls_pooler"} - WORD_ONLY_POOLINGS))
def test_poolings_are_what_their_names_say(encoder, pooling):
    encoder.eval()
    rows = encoder.prepare(TEXTS).rows()
    ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    mask = (torch.arange(ids.shape[1]) < torch.tensor([len(r) for r in rows])[:, None]).long()
    output = encoder.backbone(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    torch.testing.assert_close(POOLINGS[pooling](output, mask), pool_by_row(pooling, output.hidden_states, mask))


def test_dropout_replaces_every_rate():
    rates = {m.p for m in load_backbone(MINILM, 0.3).modules() if isinstance(m, torch.nn.Dropout)}
    assert rates == {0.3}


def test_rows_keep_their_order_and_length_limit(encoder):
    encoder.eval()
    encoder.max_length = 6
    inputs = encoder.prepare(TEXTS)
    assert int(inputs.lengths.max()) == 6
    flipped = TokenBatch.concat([TokenBatch(r, torch.tensor([len(r)])) for r in inputs.rows()[::-1]])
    torch.testing.assert_close(encoder(flipped).flip(0), encoder(inputs), rtol=1e-5, atol=1e-6)


def test_a_folder_without_a_pooling_is_read_with_the_mean_and_says_so(tmp_path):
    load_backbone(MINILM, None).save_pretrained(tmp_path)
    load_tokenizer(MINILM).save_pretrained(tmp_path)
    encoder, known = load_folder(str(tmp_path))
    assert (encoder.pooling, "the mean is assumed" in known) == ("mean", True)
    assert load_folder(str(tmp_path), "cls")[0].pooling == "cls"


@pytest.mark.parametrize(("pooling", "message"), [("nope", "pooling=nope"), ("cls_pooler", "has no pooler")])
def test_poolings_that_cannot_be(pooling, message):
    backbone = load_backbone(MINILM, None)
    backbone.pooler = None
    with pytest.raises(InputError, match=message):
        TextEncoder(backbone, load_tokenizer(MINILM), pooling)


def test_encode_needs_no_wrapper(encoder):
    encoder.train()
    z = encoder.encode([*TEXTS, TEXTS[0]], batch_size=5)
    torch.testing.assert_close(z, CachedEncoder(encoder)([*TEXTS, TEXTS[0]]), rtol=1e-5, atol=1e-6)
    assert encoder.training and not z.requires_grad and z.dtype == torch.float32
    unit = encoder.encode(TEXTS, normalize=True)
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(len(TEXTS)))
    encoder.normalize = True
    torch.testing.assert_close(encoder.encode(TEXTS, normalize=False), z[:-1], rtol=1e-5, atol=1e-6)
    assert encoder.normalize
    assert encoder.encode([]).shape == (0, encoder.dim)


@pytest.mark.parametrize("item", ["A text.", b"image"])
def test_a_single_item_is_not_encoded_letter_by_letter(encoder, item):
    with pytest.raises(InputError, match="pass a list"):
        encoder.encode(item)


def test_a_backbone_with_a_vocabulary_of_a_few_words_can_pack():
    tokenizer = make_tokenizer(["a", "man"])
    backbone = random_backbone({"model_type": "bert", "vocab_size": 4, **TINY})
    assert TextEncoder(backbone, tokenizer).execution.layout == "packed"
