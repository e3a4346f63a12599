import pytest
import torch

from tercet.errors import InputError
from tercet.evaluation import AlignmentUniformity, EvaluatorGroup, Retrieval
from tests.evaluation.fakes import Listed, words

PAIRS = Listed({"q": ["a b", "c d", "e f"], "d": ["a c", "c d", "f g"]})


def test_the_same_numbers():
    members = {"retrieval": Retrieval(PAIRS, [1], "toy"), "geometry": AlignmentUniformity(PAIRS, "toy")}
    assert EvaluatorGroup(members)(words) == members["retrieval"](words) | members["geometry"](words)


def test_nothing_is_remembered_from_one_model_to_the_next():
    evaluator = EvaluatorGroup({"geometry": AlignmentUniformity(PAIRS, "toy")})
    assert evaluator(words) != evaluator(lambda texts: torch.eye(len(texts)))


def test_a_clash_is_an_error():
    both = EvaluatorGroup({"one": AlignmentUniformity(PAIRS, "toy"), "two": AlignmentUniformity(PAIRS, "toy")})
    with pytest.raises(InputError, match=r"members.two measures alignment_uniformity/toy/alignment, .* Give it another name"):
        both(words)


def test_nothing_is_measured_by_nobody():
    assert EvaluatorGroup({})(words) == {}
