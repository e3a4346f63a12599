"""Prompts: set in the configuration, used in training by column, applied by encode, saved, and read again."""

import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from tercet.app.components import build
from tercet.app.config_checks import check_model
from tercet.data import TextTransform
from tercet.errors import InputError
from tercet.models import DualEncoder, TextEncoder, load, load_backbone, load_tokenizer, save_model
from tercet.models.prompts import Prompts
from tests.conftest import TEXTS, composed, tiny

BOTH = "model.prompt=['query: ','passage: ']"


def source(columns=("question", "answer")):
    rows = Dataset.from_dict({column: TEXTS[:3] for column in columns})
    return SimpleNamespace(columns=list(columns), rows=lambda: rows, fingerprint=lambda: "rows")


def encoder_of(*overrides):
    torch.manual_seed(0)
    return build(composed(*tiny(*overrides)).model).eval()


def test_each_column_has_its_prompt(tmp_path):
    cfg = composed(*tiny(BOTH, f"data.cache={tmp_path}"))
    transform = build(cfg.data.transform)
    batch = transform.load(source())
    tokenizer = transform.tokenizer
    for v, prompt in enumerate(("query: ", "passage: ")):
        want = tokenizer([prompt + text for text in TEXTS[:3]], truncation=True, max_length=transform.max_length).input_ids
        assert batch.rows[f"ids_{v}"].to_pylist() == want
    plain = build(composed(*tiny(f"data.cache={tmp_path}")).data.transform)
    assert plain.fingerprint(["a", "b"]) != transform.fingerprint(["a", "b"])
    assert plain.fingerprint(["a", "b"]) == TextTransform(tokenizer, plain.max_length, "elsewhere").fingerprint(["a", "b"])
    with pytest.raises(InputError, match=r"prompt has 2 texts, and the rows 1 columns \(text\)"):
        transform.load(source(["text"]))


def test_one_prompt_is_that_of_all_columns():
    transform = build(composed(*tiny("model.prompt='Title: '")).data.transform)
    assert transform.prompts(["a", "b", "c"]) == ["Title: "] * 3


@pytest.mark.parametrize(
    ("overrides", "prompts", "default"),
    [
        (["model.prompt='Title: '"], {"default": "Title: "}, "default"),
        ([BOTH], {"query": "query: ", "document": "passage: "}, "query"),
    ],
)
def test_encode_applies_it_and_a_folder_keeps_it(tmp_path, overrides, prompts, default):
    encoder, bare = encoder_of(*overrides), encoder_of()
    want = bare.encode([prompts[default] + text for text in TEXTS])
    torch.testing.assert_close(encoder.encode(TEXTS), want)
    save_model(encoder, tmp_path)
    said = json.loads((tmp_path / "config_sentence_transformers.json").read_text())
    assert (said["prompts"], said["default_prompt_name"]) == (prompts, default)
    assert load(tmp_path).prompts == Prompts(prompts, default)
    torch.testing.assert_close(load(tmp_path).encode(TEXTS), want)


def test_what_takes_no_prompt_says_so(encoder):
    with pytest.raises(InputError, match=r"g.prompt: two encoders take no prompts"):
        DualEncoder(encoder_of(), encoder_of("model.prompt=x"))
    encoder.pooling = "cls"
    with pytest.raises(InputError, match="pooling=cls cannot leave out the tokens of a prompt"):
        encoder.prompts = Prompts({"q": "x"}, "q", pooled=False)


def test_a_prompt_that_the_backbone_was_made_with_is_said(tmp_path):
    save_model(encoder_of("model.prompt='query: '"), tmp_path)
    data = SimpleNamespace(transform=SimpleNamespace(max_length=8))
    for prompt in ("", "query: "):
        encoder = TextEncoder(load_backbone(str(tmp_path)), load_tokenizer(str(tmp_path)), prompt=prompt)
        objective = SimpleNamespace(encoder=encoder, makes_views=False)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            check_model(objective, data, several=False)
        said = [str(warning.message) for warning in caught if "set model.prompt" in str(warning.message)]
        assert bool(said) is not bool(prompt)
