"""Any encode function will do: torch or numpy, of any type of numbers, also a method of a model."""

import json

import numpy as np
import pytest
import torch

from tercet.errors import InputError
from tercet.evaluation import AdjacentSentences, AlignmentUniformity, Clustering, NearestNeighbor, Retrieval
from tercet.evaluation.inputs import as_embeddings, encode_once
from tests.evaluation.fakes import Counted, Listed, words

TEXTS = [f"{a} {b} x{i % 2}" for i, (a, b) in enumerate(zip("abcdabcd", "efghfghe", strict=True))]
LABELED = {"text": TEXTS, "label": [0, 1, 2, 3] * 2, "position": list(range(8))}
PAIRS = {"query": TEXTS[:4], "document": TEXTS[4:]}
EVALUATORS = [
    Retrieval(PAIRS, [1]),
    AlignmentUniformity(PAIRS),
    NearestNeighbor(LABELED, neighbors=1),
    Clustering(LABELED),
    AdjacentSentences(LABELED | {"label": [0] * 8}, window=4),
]


class Model:
    num_outputs = 2

    def encode(self, items):
        return words(items)

    def to_numpy(self, items):
        return words(items).numpy()


KINDS = {
    "numpy": lambda texts: words(texts).numpy(),
    "float16": lambda texts: words(texts).half().numpy(),
    "bfloat16": lambda texts: words(texts).bfloat16(),
    "float64": lambda texts: words(texts).double().numpy(),
    "integers": lambda texts: words(texts).long(),
    "gradients": lambda texts: words(texts).requires_grad_(),
    "read-only": lambda texts: np.broadcast_to(words(texts).numpy()[None], (1, len(texts), 256))[0],
    "lists": lambda texts: words(texts).tolist(),
    "method": Model().encode,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("evaluator", EVALUATORS, ids=lambda evaluator: type(evaluator).__name__)
def test_any_encode_function_gives_the_same(evaluator, kind):
    """Counts of words are exact in all types."""
    if kind == "method" and isinstance(evaluator, AdjacentSentences):
        assert evaluator(Model().encode) == evaluator(Model().to_numpy) != evaluator(words)  # two outputs: [f; g]
    else:
        found, expected = evaluator(KINDS[kind]), evaluator(words)
        assert found == pytest.approx(expected, abs=1e-6)
        assert json.loads(json.dumps(found)) == found


def test_types():
    assert as_embeddings(KINDS["float64"], TEXTS).dtype == torch.float64
    assert {as_embeddings(KINDS[kind], TEXTS).dtype for kind in ("numpy", "float16", "bfloat16", "integers")} == {torch.float32}
    z = words(TEXTS)
    assert as_embeddings(lambda _: z, TEXTS).data_ptr() == z.data_ptr()  # nothing is copied without need


@pytest.mark.parametrize(("encode", "message"), [
    (lambda texts: torch.ones(len(texts)), r"shape \(8,\) for 8 items: \(N, D\)"),
    (lambda texts: np.ones((3, 4)), r"shape \(3, 4\) for 8 items"),
    (lambda texts: [[1.0], [1.0, 2.0]], "encode returned list: an array of numbers is needed"),
    (lambda texts: None, "encode returned NoneType"),
    (lambda texts: np.array(texts), "encode returned ndarray"),
])  # fmt: skip
def test_what_is_no_embedding_is_an_error(encode, message):
    with pytest.raises(InputError, match=message):
        as_embeddings(encode, TEXTS)


def test_not_finite():
    z = words(TEXTS)
    z[2] = torch.inf
    assert as_embeddings(lambda _: z, TEXTS).isinf().any()
    with pytest.raises(InputError, match="suite of toy: 1 of 8 embeddings are not finite"):
        as_embeddings(lambda _: z.numpy(), TEXTS, "suite of toy")


def test_each_text_is_encoded_once():
    encode = Counted()
    embed = encode_once(encode, ["a", "b", "a", "c"])
    assert encode.calls == [["a", "b", "c"]]
    assert torch.equal(embed(["c", "a", "a"]), words(["c", "a", "a"]))


def test_columns_are_a_source():
    assert Retrieval(PAIRS)(words) == Retrieval(Listed(PAIRS))(words)
    labeled = {name: LABELED[name] for name in ("text", "label")}
    assert NearestNeighbor(labeled)(words) == NearestNeighbor(Listed(labeled))(words)


def test_declared_needs():
    needs = {type(evaluator).__name__: getattr(evaluator, "needs", set()) for evaluator in EVALUATORS}
    assert needs["Clustering"] == needs["NearestNeighbor"] == {"label"}
    assert needs["AdjacentSentences"] == {"label", "position"}
    assert needs["Retrieval"] == needs["AlignmentUniformity"] == set()
