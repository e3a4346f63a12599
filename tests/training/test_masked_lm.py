"""The masked-LM auxiliary."""

import pytest
import torch

from tercet.app.components import build
from tercet.models import Execution, load_backbone, load_tokenizer
from tercet.training import MaskedLM
from tercet.types import Batch, TokenBatch
from tests.conftest import MINILM, TEXTS, composed, tiny


@pytest.fixture
def head(encoder):
    return MaskedLM(weight=0.1, probability=0.15, whole_words=False).build(encoder)


def test_the_weight_0_costs_nothing(encoder):
    assert MaskedLM(weight=0, probability=0.15, whole_words=False).build(encoder) is None


def test_backbone_and_word_vectors_are_shared(head, encoder):
    words = encoder.backbone.get_input_embeddings().weight
    assert head.lm.get_output_embeddings().weight is words
    shared = {id(p) for p in encoder.parameters()}
    assert [name for name, p in head.named_parameters() if id(p) in shared] == ["lm.cls.predictions.decoder.weight"]


def test_fifteen_percent_are_asked_and_eighty_ten_ten_is_kept(head):
    ids = torch.randint(1000, 2000, (200_000,))
    corrupted, targets = head.corrupt(ids)
    asked = targets >= 0
    assert float(asked.float().mean()) == pytest.approx(0.15, abs=0.005)
    assert torch.equal(targets[asked], ids[asked])
    assert torch.equal(corrupted[~asked], ids[~asked])
    masked = (corrupted == head.mask_id) & asked
    kept = (corrupted == ids) & asked
    assert float(masked.sum() / asked.sum()) == pytest.approx(0.8, abs=0.01)
    assert float(kept.sum() / asked.sum()) == pytest.approx(0.1, abs=0.01)


def test_special_tokens_are_never_asked(head, encoder):
    inputs = encoder.prepare(TEXTS * 50)
    special = torch.isin(inputs.ids, torch.tensor(encoder.tokenizer.all_special_ids))
    corrupted, targets = head.corrupt(inputs.ids)
    assert (targets[special] == -100).all()
    assert torch.equal(corrupted[special], inputs.ids[special])


def test_the_loss_is_the_one_of_transformers(head, encoder, monkeypatch):
    head.eval()
    encoder.eval()
    inputs = encoder.prepare(TEXTS)
    corrupted, targets = head.corrupt(inputs.ids)
    monkeypatch.setattr(head, "corrupt", lambda ids: (corrupted, targets))
    pad = torch.nn.utils.rnn.pad_sequence
    lengths = inputs.lengths.tolist()
    ids = pad(corrupted.split(lengths), batch_first=True)
    labels = pad(targets.split(lengths), batch_first=True, padding_value=-100)
    mask = (torch.arange(ids.shape[1]) < inputs.lengths[:, None]).long()
    found = []
    for execution in (Execution("padded", "torch", None, None, False), Execution("sorted", "torch", 30, None, True)):
        head.execution = execution
        found.append(head(inputs))
    setattr(head.lm, head.lm.base_model_prefix, encoder.backbone)
    expected = head.lm(input_ids=ids, attention_mask=mask, labels=labels).loss
    for terms in found:
        torch.testing.assert_close(terms.loss_sum / terms.normalizer, expected)
        assert float(terms.normalizer) == float((targets >= 0).sum())


def test_a_text_without_targets_is_finite(head):
    terms = head(TokenBatch.from_lists([[101, 102], [101, 102]]))
    terms.loss_sum.backward()
    assert float(terms.loss_sum) == 0
    assert float(terms.normalizer) == 0


def test_pretrained_heads_come_with_the_backbone(tmp_path):
    from transformers import AutoModelForMaskedLM, BertConfig

    torch.manual_seed(1)
    config = BertConfig(vocab_size=30522, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    lm = AutoModelForMaskedLM.from_config(config)
    lm.save_pretrained(tmp_path)
    load_tokenizer(MINILM).save_pretrained(tmp_path)
    encoder = build(composed("model=minilm", f"model.backbone.name={tmp_path}").model)
    head = MaskedLM(weight=0.1, probability=0.15, whole_words=False).build(encoder)
    torch.testing.assert_close(head.lm.cls.predictions.transform.dense.weight, lm.cls.predictions.transform.dense.weight)
    assert all(m.training for m in head.modules())


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_the_objectives_value_is_contrast_plus_weight_times_mlm():
    from tests.laws.test_encoding import batch_of

    module = build(composed(*tiny("objective=simcse_unsup", "objective.mlm.weight=0.5", "model.backbone.dropout=0")).objective)
    batch = batch_of(module, 1)
    torch.manual_seed(0)
    both = module.training_step(batch, 0)
    torch.manual_seed(0)
    masked = module.mlm(TokenBatch.concat(module.views(batch).views))
    module.mlm = None
    contrast = module.training_step(batch, 0)
    torch.testing.assert_close(both, contrast + 0.5 * masked.loss_sum / masked.normalizer)


def test_minilm_has_no_head_and_gets_one():
    encoder = build(composed("model=minilm").model)
    head = MaskedLM(weight=0.1, probability=0.15, whole_words=False).build(encoder)
    assert head.lm.get_output_embeddings().weight is encoder.backbone.get_input_embeddings().weight
    assert load_backbone(MINILM, None).config.vocab_size == head.lm.config.vocab_size


def test_whole_words_are_asked_or_not(encoder):
    head = MaskedLM(weight=1.0, probability=0.3, whole_words=True).build(encoder)
    ids = encoder.prepare(["Unbelievable incomprehensibilities notwithstanding, electroencephalography disappoints."] * 300).ids
    corrupted, targets = head.corrupt(ids)
    pieces = encoder.tokenizer.convert_ids_to_tokens(ids.tolist())
    asked, split = (targets >= 0).tolist(), 0
    for i in range(1, len(pieces)):
        if pieces[i].startswith("##"):
            assert asked[i] == asked[i - 1]
            split += 1
    assert split > 300
    assert 0.2 < sum(asked) / (len(asked) - 600) < 0.4
    assert torch.equal(corrupted[targets < 0], ids[targets < 0])


def test_pretraining_touches_all_but_the_head(encoder):
    module = build(composed(*tiny("objective=mlm", "model.head.kind=mlp", "model.pooling=cls_pooler")).objective)
    batch = Batch((module.encoder.prepare(TEXTS),), *(torch.arange(len(TEXTS)),) * 3, torch.arange(len(TEXTS))[None])
    module.training_step(batch, 0).backward()
    named = {name: p for name, p in module.named_parameters()}
    assert all((p.grad is not None) == p.requires_grad for p in named.values())
    frozen = {name for name, p in named.items() if not p.requires_grad}
    assert frozen and all("head" in name or "pooler" in name for name in frozen)


def test_pretraining_without_weight_is_a_mistake():
    with pytest.raises(Exception, match=r"mlm.weight=0: masked language modeling is all"):
        build(composed(*tiny("objective=mlm", "objective.mlm.weight=0")).objective)
