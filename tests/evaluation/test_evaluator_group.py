import pytest
import torch

from tercet.errors import InputError
from tercet.evaluation import AlignmentUniformity, EvaluatorGroup, Retrieval
from tests.evaluation.fakes import Listed, words

PAIRS = Listed({"q": ["a b", "c d", "e f"], "d": ["a c", "c d", "f g"]})


def test_the_same_numbers():
    members = {"retrieval": Retrieval("toy", PAIRS, [1]), "geometry": AlignmentUniformity("toy", PAIRS)}
    assert EvaluatorGroup(members)(words) == members["retrieval"](words) | members["geometry"](words)


def test_nothing_is_remembered_from_one_model_to_the_next():
    evaluator = EvaluatorGroup({"geometry": AlignmentUniformity("toy", PAIRS)})
    assert evaluator(words) != evaluator(lambda texts: torch.eye(len(texts)))


def test_a_clash_is_an_error():
    both = EvaluatorGroup({"one": AlignmentUniformity("toy", PAIRS), "two": AlignmentUniformity("toy", PAIRS)})
    with pytest.raises(InputError, match=r"evaluation.members.two measures alignment_uniformity/toy/alignment, .* Rename it"):
        both(words)


def test_nothing_is_measured_by_nobody():
    assert EvaluatorGroup({})(words) == {}
