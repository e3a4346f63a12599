"""Families of models: equal to transformers' own model on one text at a time, or refused with a reason."""

import re

import pytest
import torch
from torch import nn

from benchmarks.families import COMMON, FAMILIES, LONG, TEXTS, check_family, make_backbone, make_tokenizer
from tercet.errors import InputError
from tercet.models import Execution, TextEncoder, load_backbone, random_backbone
from tercet.models.engine.backbone_runner import BackboneRunner
from tercet.models.export import export_model
from tercet.models.folder import load_folder, save_model
from tercet.training.masked_lm import MaskedLM
from tests.conftest import MINILM

PADDING_MATTERS = {"convbert", "fnet", "funnel", "mobilebert", "nystromformer", "phi3 longrope", "yoso"}
REFUSED = {
    "pegasus": "cannot encode rows of token ids", "reformer": r"gives \(3, 64\) for a row of 3 tokens",
    "big_bird block_sparse": "is not supported so: a short text changes its attention_type from block_sparse to original_full",
}  # fmt: skip
NO_MASKED_LM = {
    "bart", "bert-generation", "bigbird_pegasus", "bloom", "gemma3_text", "gpt2", "llama", "mistral", "mt5", "opt",
    "phi3 longrope", "qwen2", "qwen3", "t5", "umt5", "xlnet",
}  # fmt: skip
FAST = {
    "bert", "bart", "big_bird", "big_bird block_sparse", "camembert", "fnet", "ibert", "longformer", "mobilebert", "pegasus",
    "phi3 longrope", "squeezebert", "t5", "xlnet",
}  # fmt: skip


@pytest.mark.parametrize("family", [f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES])
def test_a_family_is_transformers_own_model_or_is_refused(family):
    outcome = check_family(family)
    if family in REFUSED:
        assert re.fullmatch(
            rf"backbone: \w+ {REFUSED[family]}.* (Use another backbone|or in backbone.config)\.", outcome.refused
        )
        return
    assert not outcome.refused
    assert max(outcome.difference.values()) < 1e-5
    assert "equal_length" in outcome.difference
    assert ("padded" in outcome.difference) == (family not in PADDING_MATTERS)
    if family in NO_MASKED_LM:
        assert outcome.masked_lm.startswith("Masked language modeling needs a transformer of text")
    else:
        assert outcome.masked_lm < 1e-5


def encoder_of(family, **options):
    torch.manual_seed(0)
    return TextEncoder(make_backbone(family), make_tokenizer(family), **options)


@pytest.mark.parametrize("layout", ["packed", "sorted", "padded"])
def test_a_layout_in_which_padding_would_matter_is_refused(layout):
    with pytest.raises(InputError, match=f"execution.layout={layout}: FNetModel cannot read .*Use execution.layout=auto"):
        encoder_of("fnet", execution=Execution(layout))


def test_rows_of_equal_length_run_together():
    encoder = encoder_of("fnet")
    assert "run by equal length (a row's embedding would depend on its padding)" in encoder.describe_execution()
    lengths = torch.tensor([4, 7, 4, 5, 7, 7])
    assert [chunk.tolist() for chunk in encoder.execution.chunks(lengths)] == [[1, 4, 5], [3], [0, 2]]
    assert encoder.execution.computed_tokens(lengths) == int(lengths.sum())


class Mean(nn.Module):
    """Adds the mean over a batch to every token."""

    def forward(self, hidden):
        return hidden + hidden.mean((0, 1))


def test_a_backbone_that_mixes_texts_of_one_length_is_refused():
    backbone = make_backbone("bert")
    backbone.embeddings.LayerNorm = nn.Sequential(backbone.embeddings.LayerNorm, Mean())
    with pytest.raises(InputError, match=r"backbone: BertModel is not supported: .* texts beside it"):
        TextEncoder(backbone, make_tokenizer("bert"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_backbone_with_values_that_are_no_numbers_names_the_weights(bad):
    backbone = make_backbone("bert")
    backbone.encoder.layer[1].output.dense.bias.data[0] = bad
    with pytest.raises(InputError, match=r"weights hold NaN or infinite values: encoder.layer.1.output.dense.bias\."):
        TextEncoder(backbone, make_tokenizer("bert"))


def test_bigbird_is_refused_with_its_default_also_where_the_encoder_has_it():
    backbone = random_backbone(
        {"model_type": "bigbird_pegasus", **COMMON, **FAMILIES["bart"], "attention_type": "block_sparse"}
    )
    with pytest.raises(InputError, match="changes its attention_type from block_sparse to original_full for all texts after"):
        TextEncoder(backbone, make_tokenizer("bart"))


def test_bigbird_with_full_attention_is_the_same_in_other_libraries_at_any_length(tmp_path):
    from sentence_transformers import SentenceTransformer

    torch.manual_seed(0)
    sizes = {**COMMON, "max_position_embeddings": 400, "block_size": 4, "num_random_blocks": 1}
    encoder = TextEncoder(
        random_backbone({"model_type": "big_bird", **sizes, "attention_type": "original_full"}), make_tokenizer("big_bird")
    ).eval()
    save_model(encoder, tmp_path)
    texts = [LONG, *TEXTS]
    theirs = torch.tensor(SentenceTransformer(str(tmp_path), device="cpu").encode(texts))
    torch.testing.assert_close(theirs, encoder.encode(texts), rtol=0, atol=1e-5)


@pytest.mark.parametrize("model_type", ["siglip_text_model", "t5gemma", "prophetnet", "nosuch"])
def test_a_model_that_cannot_be_made_is_one_clear_message(model_type):
    with pytest.raises(InputError, match=f"config.model_type={model_type}: transformers .*Change config, or use another type"):
        random_backbone({"model_type": model_type, **COMMON})


def test_verifying_changes_neither_mode_nor_random_state():
    for mode in (True, False):
        backbone, before = make_backbone("bert").train(mode), torch.get_rng_state()
        BackboneRunner(backbone, 1)
        assert backbone.training is mode and torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("family", ["ibert", "xlm-roberta"])
def test_a_length_above_the_positions_is_cut_to_them_and_said(family, caplog):
    encoder = encoder_of(family, max_length=40).eval()
    assert encoder.max_length == 38
    assert "Texts are cut at 38 tokens, not 40" in caplog.text
    assert encoder.encode([LONG]).isfinite().all()
    assert encoder.token_info().max_length == 38


def test_a_model_without_a_table_of_positions_has_no_limit():
    encoder = encoder_of("xlnet", max_length=300)
    assert encoder.max_length == 300 and len(encoder.prepare([LONG]).ids) > 200


def test_xlnet_gets_the_types_of_its_tokens():
    encoder = encoder_of("xlnet")
    rows = encoder.prepare(TEXTS[:1])
    types = encoder.runner.type_arguments(rows.ids[None])["token_type_ids"]
    assert types.tolist() == [[0] * (len(rows.ids) - 1) + [2]]
    assert encoder_of("bert").runner.type_arguments(rows.ids[None]) == {}, "all are 0, which BERT assumes"


def test_xlnet_keeps_its_types_in_other_libraries(tmp_path):
    from sentence_transformers import SentenceTransformer

    encoder = encoder_of("xlnet").eval()
    save_model(encoder, tmp_path)
    theirs = torch.tensor(SentenceTransformer(str(tmp_path), device="cpu").encode(TEXTS))
    torch.testing.assert_close(theirs, encoder.encode(TEXTS), rtol=0, atol=1e-5)


def test_a_tokenizer_whose_other_outputs_are_needed_is_refused():
    backbone, tokenizer = make_backbone("roc_bert"), make_tokenizer("roc_bert")
    shapes = type("Shapes", (type(tokenizer),), {"__call__": lambda self, *texts, **_: {
        "input_ids": [0, 5, 2], "token_type_ids": [0, 0, 0], "input_shape_ids": [1, 1, 1]}})  # fmt: skip
    tokenizer.__class__ = shapes
    with pytest.raises(InputError, match="tokenizer: RoCBertModel takes input_shape_ids from it"):
        TextEncoder(backbone, tokenizer)


def test_t5_is_its_encoder_and_comes_back(tmp_path):
    encoder = encoder_of("t5").eval()
    assert type(encoder.backbone).__name__ == "T5EncoderModel"
    save_model(encoder, tmp_path)
    torch.testing.assert_close(load_folder(str(tmp_path))[0].eval().encode(TEXTS), encoder.encode(TEXTS))
    assert type(load_backbone(str(tmp_path), 0.3)).__name__ == "T5EncoderModel"
    rates = {m.p for m in load_backbone(str(tmp_path), 0.3).modules() if isinstance(m, nn.Dropout)}
    assert rates == {0.3}


def test_a_pooler_that_a_model_always_calls_is_not_trained():
    encoder = encoder_of("squeezebert").train()
    encoder(encoder.prepare(TEXTS)).sum().backward()
    without = {name for name, p in encoder.named_parameters() if p.requires_grad and p.grad is None}
    assert not without, "DDP would wait for them"


def test_a_masked_text_gets_no_special_token():
    head = MaskedLM(weight=0.1, probability=0.9).build(encoder_of("roberta"))
    ids = torch.full((5000,), 9)
    corrupted = head.corrupt(ids)[0]
    assert set(corrupted.tolist()) - {head.mask_id} <= set(torch.arange(len(head.special))[~head.special].tolist())


def test_export_is_for_models_that_can_pad(tmp_path):
    with pytest.raises(InputError, match="FNetModel cannot read: a row's embedding would depend on its padding"):
        export_model(encoder_of("fnet"), tmp_path)


def test_positions_limit_rows_also_where_the_verifying_rows_are_longer():
    backbone = random_backbone({"model_type": "bert", **COMMON, "max_position_embeddings": 4})
    assert BackboneRunner(backbone, 1).max_tokens == 4


def test_a_pretrained_model_is_verified_once(monkeypatch):
    """The forward passes that verify it are few: a large model is built quickly."""
    calls = []
    backbone = load_backbone(MINILM)
    backbone.register_forward_hook(lambda *_: calls.append(1))
    BackboneRunner(backbone, 0)
    assert len(calls) <= 9
