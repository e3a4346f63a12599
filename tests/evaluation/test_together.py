import pytest
import torch

from tercet.error import InputError
from tercet.evaluation import Geometry, Retrieval, Together
from tests.evaluation.fakes import Listed, words

PAIRS = Listed({"q": ["a b", "c d", "e f"], "d": ["a c", "c d", "f g"]})


def test_the_same_numbers():
    members = {"retrieval": Retrieval("toy", PAIRS, [1]), "geometry": Geometry("toy", PAIRS)}
    assert Together(members)(words) == members["retrieval"](words) | members["geometry"](words)


def test_nothing_is_remembered_from_one_model_to_the_next():
    evaluator = Together({"geometry": Geometry("toy", PAIRS)})
    assert evaluator(words) != evaluator(lambda texts: torch.eye(len(texts)))


def test_a_clash_is_an_error():
    both = Together({"one": Geometry("toy", PAIRS), "two": Geometry("toy", PAIRS)})
    with pytest.raises(InputError, match=r"evaluation.members.two measures geometry/toy/alignment, .* Rename it"):
        both(words)


def test_nothing_is_measured_by_nobody():
    assert Together({})(words) == {}
