"""The masked-LM auxiliary."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tercet.app.components import build
from tercet.errors import InputError
from tercet.models import Execution, load, load_backbone, load_tokenizer
from tercet.rng import derive_seed
from tercet.training import MaskedLM, masked_lm
from tercet.training.masked_lm import capacity
from tercet.types import Batch, RowIndex, TokenBatch, TokenState
from tests.conftest import MINILM, TEXTS, composed, tiny
from tests.laws.device_operations import DeviceOperations, HostWaitsError, do_as_on_a_gpu
from tests.laws.recorded_graphs import replay_on_a_cpu


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


def test_the_loss_is_the_one_of_transformers(head, encoder):
    head.eval()
    encoder.eval()
    inputs = encoder.prepare(TEXTS)
    inputs.state.dropout_seed = derive_seed(torch.zeros_like(inputs.ids), torch.arange(len(inputs.ids)))
    corrupted, targets = head.corrupt(inputs.ids, inputs.state.dropout_seed)
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


def language_model(folder, change):
    """A folder with a language model and head, whose weights ``change`` has changed; returns the model as it was."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForMaskedLM, BertConfig

    torch.manual_seed(1)
    config = BertConfig(vocab_size=30522, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    lm = AutoModelForMaskedLM.from_config(config)
    lm.cls.predictions.bias.data.normal_()
    lm.save_pretrained(folder)
    load_tokenizer(MINILM).save_pretrained(folder)
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    return lm


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_a_head_with_the_prefix_of_a_wrapper_is_read(tmp_path, prefix, capsys):
    lm = language_model(tmp_path, lambda weights: {prefix + name: x for name, x in weights.items()})
    head = MaskedLM(weight=0.1).build(load(tmp_path))
    theirs = {name: x for name, x in lm.state_dict().items() if name.startswith("cls.")}
    torch.testing.assert_close({name: x for name, x in head.lm.state_dict().items() if name.startswith("cls.")}, theirs)
    assert "starts anew" not in capsys.readouterr().err


def test_a_part_of_a_head_is_refused_and_none_is_said(tmp_path, capsys):
    language_model(tmp_path, lambda weights: {k: x for k, x in weights.items() if "transform.dense.weight" not in k})
    encoder = load(tmp_path)
    with pytest.raises(InputError, match=r"head: it lacks weights of the model: cls.predictions.transform.dense.weight\."):
        MaskedLM(weight=0.1).build(encoder)
    language_model(tmp_path, lambda weights: {k: x for k, x in weights.items() if not k.startswith("cls.")})
    capsys.readouterr()
    MaskedLM(weight=0.1).build(load(tmp_path))
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "has no language-model head: that of masked language modeling starts anew" in said


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_the_objectives_value_is_contrast_plus_weight_times_mlm():
    from tests.laws.test_encoding import batch_of

    module = build(composed(*tiny("objective=simcse_unsup", "objective.mlm.weight=0.5", "model.backbone.dropout=0")).objective)
    batch = batch_of(module, 1)
    torch.manual_seed(0)
    both = module.training_step(batch, 0)
    torch.manual_seed(0)
    masked = module.mlm(TokenBatch.concat(module.prepare(batch).views))
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


def of_length(*lengths):
    """Rows without special tokens inside, and a seed for each token."""
    ids = torch.randint(1000, 2000, (sum(lengths),))
    return TokenBatch(ids, torch.tensor(lengths), TokenState(dropout_seed=torch.randint(1 << 62, ids.shape)))


def test_a_seed_decides_what_is_asked_in_any_batch(encoder):
    head = MaskedLM(weight=1.0, whole_words=True).build(encoder)
    text = encoder.prepare(TEXTS * 9)
    text.state.dropout_seed = torch.randint(1 << 62, text.ids.shape)
    whole = head.corrupt(text.ids, text.state.dropout_seed)
    torch.manual_seed(7)
    for rows in torch.arange(len(text)).split(7):
        part = text.select(rows)
        for found, column in zip(head.corrupt(part.ids, part.state.dropout_seed), whole, strict=True):
            assert torch.equal(found, TokenBatch(column, text.lengths).select(rows).ids)
    other = head.corrupt(text.ids, text.state.dropout_seed + 1)
    assert not torch.equal(other[1], whole[1])


def test_seeded_choices_are_fifteen_percent_eighty_ten_ten(head):
    inputs = of_length(200_000)
    corrupted, targets = head.corrupt(inputs.ids, inputs.state.dropout_seed)
    asked = targets >= 0
    assert float(asked.float().mean()) == pytest.approx(0.15, abs=0.005)
    assert float((corrupted == head.mask_id)[asked].float().mean()) == pytest.approx(0.8, abs=0.01)
    assert float((corrupted == inputs.ids)[asked].float().mean()) == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("whole_words", [False, True])
@pytest.mark.parametrize("seeded", [False, True])
def test_nothing_is_read_and_no_shape_depends_on_the_choice(encoder, monkeypatch, whole_words, seeded):
    head = MaskedLM(weight=1.0, whole_words=whole_words).build(encoder)
    do_as_on_a_gpu(monkeypatch)
    inputs = of_length(*[30] * 40)
    hidden = torch.randn(len(inputs.ids), encoder.hidden, requires_grad=True)
    with DeviceOperations():
        _, targets = head.corrupt(inputs.ids, inputs.state.dropout_seed if seeded else None)
        head.token_losses(hidden, targets, len(inputs.ids)).sum(0)[0].backward()
    monkeypatch.undo()
    with pytest.raises(HostWaitsError), DeviceOperations():
        head.token_losses(hidden, targets, len(inputs.ids))


@pytest.mark.parametrize("lengths", [[30] * 40, [2, 3], [9, 70, 4]])
def test_unused_slots_change_neither_loss_nor_gradient(encoder, monkeypatch, lengths):
    head = MaskedLM(weight=1.0, whole_words=True).build(encoder).eval()
    encoder.eval()
    inputs = of_length(*lengths)
    found = []
    for exactly in (True, False):
        monkeypatch.setattr(masked_lm, "runs_on_cpu", lambda device, exactly=exactly: exactly)
        head.zero_grad()
        terms = head(inputs)
        terms.loss_sum.backward()
        found.append((terms.loss_sum, terms.normalizer, {n: p.grad.clone() for n, p in head.named_parameters()}))
    torch.testing.assert_close(found[0], found[1])


def test_the_slots_hold_what_is_asked(head):
    assert capacity(57_344, 0.15) < 1.15 * 0.15 * 57_344
    assert capacity(5, 0.15) == 5
    for tokens in (40, 400, 40_000):
        for _ in range(50):
            asked = (head.corrupt(torch.randint(1000, 2000, (tokens,)))[1] >= 0).sum()
            assert asked <= capacity(tokens, 0.15)


def test_what_exceeds_the_slots_is_not_predicted(head, monkeypatch):
    monkeypatch.setattr(masked_lm, "runs_on_cpu", lambda device: False)
    targets = torch.arange(1000, 2000)
    terms = head.token_losses(torch.randn(1000, head.lm.config.hidden_size), targets, 1000)
    assert torch.equal(terms[:, 1], (torch.arange(1000) < capacity(1000, 0.15)).float())
    assert torch.isfinite(terms).all()


def test_tokens_that_belong_to_no_row_change_nothing(head, encoder, monkeypatch):
    """A graph has more tokens than its rows: those after them are of an earlier batch."""
    embed = encoder.backbone.get_input_embeddings()
    states = lambda rows, packed: (SimpleNamespace(last_hidden_state=rows.index.pad(embed(rows.ids))), None)  # noqa: E731
    monkeypatch.setattr(head, "_run_backbone", states)
    monkeypatch.setattr(masked_lm, "runs_on_cpu", lambda device: False)
    head.eval()
    inputs = of_length(9, 20, 4)
    plain = head._rows(inputs)
    old = of_length(15)
    state = TokenState(dropout_seed=torch.cat([inputs.state.dropout_seed, old.state.dropout_seed]))
    longer = TokenBatch(torch.cat([inputs.ids, old.ids]), inputs.lengths, state)
    longer.index = replace(RowIndex.of(inputs.lengths, RowIndex.layout(inputs.lengths, 48), 48), longest=32)
    torch.testing.assert_close(head._rows(longer), plain)
    assert plain[:, 1].sum() > 0


def test_a_compiled_backbone_is_not_replayed(encoder, monkeypatch):
    """Neither for the loss nor for the embeddings."""
    replay_on_a_cpu(monkeypatch)
    head, text = MaskedLM(weight=1.0).build(encoder), encoder.prepare(TEXTS)
    text.state.dropout_seed = torch.randint(1 << 62, text.ids.shape)
    for compiled in ([encoder.backbone], []):
        encoder.runner.compiled = compiled
        head(text).loss_sum.backward()
        assert bool(head.replay.graphs) == (not compiled)


@pytest.mark.parametrize("chunk_tokens", [None, 48])
def test_a_recomputed_loss_is_replayed(encoder, chunk_tokens, monkeypatch):
    replay_on_a_cpu(monkeypatch)
    head, text = MaskedLM(weight=1.0, whole_words=True).build(encoder), encoder.prepare(TEXTS)
    text.state.dropout_seed = derive_seed(torch.zeros_like(text.ids), torch.arange(len(text.ids)))
    found = []
    for graphs in (False, True, True):
        head.execution = Execution("packed", "deterministic", chunk_tokens, None, True, graphs)
        head.zero_grad()
        terms = head(text)
        terms.loss_sum.backward()
        found.append([terms.loss_sum.detach(), terms.normalizer, *(p.grad.clone() for p in head.parameters())])
        assert bool(head.replay.graphs) == graphs
    for plain, *replayed in zip(*found, strict=True):
        for other in replayed:
            torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_a_replayed_loss_is_the_plain_one(encoder):
    head = MaskedLM(weight=1.0, whole_words=True).build(encoder).cuda()
    encoder.cuda()
    text = encoder.prepare(TEXTS * 9).to("cuda")
    text.state.dropout_seed = torch.randint(1 << 62, text.ids.shape, device="cuda")
    found = []
    for graphs in (False, True, True):
        head.execution = Execution("packed", "deterministic", graphs=graphs)
        head.zero_grad()
        encoder.zero_grad()
        terms = head(text)
        terms.loss_sum.backward()
        gradients = {
            n: p.grad.clone() for n, p in [*head.named_parameters(), *encoder.named_parameters()] if p.grad is not None
        }
        found.append((terms.loss_sum.detach(), terms.normalizer, gradients))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[2], found[1], rtol=0, atol=0)
