"""Writing the values by example: the hash of the test, whatever the model, and what an encode function has beside."""

import numpy as np
import pytest
import torch

from tercet.app import examples
from tercet.app.components import build
from tercet.evaluation import AdjacentSentences, AlignmentUniformity, EvaluatorGroup, Retrieval
from tercet.models import CachedEncoder
from tests.conftest import TEXTS, composed, tiny
from tests.evaluation.fakes import noise, words

PAIRS = {"q": TEXTS[:6], "d": TEXTS[6:12]}
MRR = "retrieval/pairs/mrr"


def written(folder, evaluator, encode, metric=MRR):
    assert examples.write_examples(folder / "x.npz", evaluator, encode)
    return examples.read_examples(folder / "x.npz", metric)


def test_the_hash_is_of_the_test_and_not_of_the_model(tmp_path):
    hashes = [written(tmp_path, Retrieval(PAIRS), encode)[1] for encode in (words, noise)]
    turned = {name: column[::-1] for name, column in PAIRS.items()}
    other = [written(tmp_path, Retrieval(rows), words)[1] for rows in (turned, {**PAIRS, "d": PAIRS["q"]})]
    assert hashes[0] == hashes[1] and len({hashes[0], *other}) == 3 and len(hashes[0]) == 16


def test_prompts_change_no_hash_where_a_text_is_in_both_columns(tmp_path):
    torch.manual_seed(0)
    source = {"q": [*TEXTS[:6], TEXTS[0]], "d": [*TEXTS[3:9], TEXTS[9]]}
    group = EvaluatorGroup({"a": AlignmentUniformity(source), "b": Retrieval(source)})
    encoders = [build(composed(*tiny(f"model.prompt={prompt}")).model).eval() for prompt in ("null", "['q: ','d: ']")]
    first, second = (written(tmp_path, group, CachedEncoder(encoder))[1] for encoder in encoders)
    assert first == second


@pytest.mark.parametrize("prompt", ["", "model.prompt=['query: ','passage: ']"])
def test_values_are_those_of_the_encode_function_with_its_prompts(tmp_path, prompt):
    torch.manual_seed(0)
    encode = CachedEncoder(build(composed(*tiny(*([prompt] if prompt else []))).model).eval())
    values, _ = written(tmp_path, Retrieval(PAIRS), encode)
    np.testing.assert_allclose(values, Retrieval(PAIRS).examples(encode)[MRR], rtol=1e-6)
    assert len(encode.others) == bool(prompt), "the second column has a prompt of its own"


def test_the_attributes_of_a_model_are_seen(tmp_path):
    class Model:
        num_outputs = 2

        def encode(self, texts):
            return noise(texts)

    source = {"text": [f"{i} x" for i in range(8)], "label": [0] * 8, "position": list(range(8))}
    evaluator, encode = AdjacentSentences(source, window=4), Model().encode
    name = "adjacent_sentences/documents/accuracy"
    values, _ = written(tmp_path, evaluator, encode, name)
    assert values.tolist() == evaluator.examples(encode)[name].tolist()
    assert values.tolist() != evaluator.examples(noise)[name].tolist(), "one output gives other guesses"


def test_directions_are_recorded_and_files_of_an_earlier_test_removed(tmp_path):
    class Errors:
        smaller_is_better = frozenset({"errors"})

        def __call__(self, encode):
            return {"mine/errors": 1.0}

        def examples(self, encode):
            return {"mine/errors": [1, 1]}

    file = tmp_path / "x.npz"
    assert examples.write_examples(file, EvaluatorGroup({"a": EvaluatorGroup({"b": Errors()})}), words)
    with examples.open_examples(file) as content:
        assert list(content[examples.SMALLER]) == ["errors"]
    assert not examples.write_examples(file, lambda encode: {}, words) and not file.exists()
