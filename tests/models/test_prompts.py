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
from tercet.evaluation import AlignmentUniformity, Retrieval, alignment, uniformity
from tercet.models import CachedEncoder, DualEncoder, TextEncoder, load, load_backbone, load_tokenizer, save_model
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
    assert said["prompts"] == {**dict.fromkeys(("query", "document"), "Title: "), **prompts}
    assert said["default_prompt_name"] == default
    assert load(tmp_path).prompts == Prompts(prompts, default)
    torch.testing.assert_close(load(tmp_path).encode(TEXTS), want)


def test_retrieval_takes_the_prompts_of_both_columns():
    queries, documents = TEXTS[:6], TEXTS[6:]
    evaluate = Retrieval({"question": queries, "answer": documents}, ks=[1, 2])
    bare, both = encoder_of(), CachedEncoder(encoder_of(BOTH))
    prompts = {**dict.fromkeys(queries, "query: "), **dict.fromkeys(documents, "passage: ")}
    by_hand = evaluate(lambda texts: bare.encode([prompts[text] + text for text in texts]))
    assert evaluate(both) == pytest.approx(by_hand)
    assert both.for_column(1) is both.for_column(1) and both.for_column(0) is both
    assert both.encoder.prompts.default == "query"
    one = CachedEncoder(encoder_of("model.prompt='Title: '"))
    assert one.for_column(0) is one.for_column(1) is one


def test_alignment_and_uniformity_take_the_prompts_of_both_columns():
    """A text of both columns is two inputs then, and one input otherwise."""
    pairs = {"question": TEXTS[:6], "answer": [TEXTS[0], *TEXTS[7:12]]}
    bare = encoder_of()
    x = bare.encode(["query: " + text for text in pairs["question"]])
    y = bare.encode(["passage: " + text for text in pairs["answer"]])
    found = AlignmentUniformity(pairs)(CachedEncoder(encoder_of(BOTH)))
    assert list(found.values()) == pytest.approx([alignment(x, y), uniformity(torch.cat([x, y]))])
    x, y = (bare.encode(texts) for texts in pairs.values())
    found = AlignmentUniformity(pairs)(CachedEncoder(bare))
    assert list(found.values()) == pytest.approx([alignment(x, y), uniformity(torch.cat([x, y[1:]]))])


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
