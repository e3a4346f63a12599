import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tercet.errors import InputError
from tercet.evaluation import AlignmentUniformity, alignment, uniformity
from tests.evaluation.fakes import Counted, Listed, words


def matrix(seed, n, d=5):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@given(seed=st.integers(0, 99), n=st.integers(2, 30), block=st.integers(1, 31))
def test_uniformity_is_the_mean_over_distinct_pairs_in_any_block(seed, n, block):
    x = matrix(seed, n)
    unit = F.normalize(x.double(), dim=-1)
    pairs = [math.exp(-2 * float((a - b).square().sum())) for i, a in enumerate(unit) for b in unit[:i]]
    assert uniformity(x, block) == pytest.approx(math.log(sum(pairs) / len(pairs)))


@given(seed=st.integers(0, 99), n=st.integers(1, 30))
def test_alignment_is_the_mean_squared_distance(seed, n):
    x, y = matrix(seed, n), matrix(seed + 1, n)
    expected = [2 - 2 * float(F.cosine_similarity(a, b, dim=0)) for a, b in zip(x, y, strict=True)]
    assert alignment(x, y) == pytest.approx(sum(expected) / n, abs=1e-6)


@given(seed=st.integers(0, 99), scale=st.floats(1e-3, 1e3))
def test_neither_knows_length_rotation_or_order(seed, scale):
    x, y = matrix(seed, 9), matrix(seed + 1, 9)
    turn, order = torch.linalg.qr(matrix(seed + 2, 5)).Q, torch.randperm(9)
    assert alignment(x[order] @ turn * scale, y[order] @ turn) == pytest.approx(alignment(x, y), abs=1e-5)
    assert uniformity(x[order] @ turn * scale) == pytest.approx(uniformity(x), abs=1e-5)


def test_known_values():
    same = torch.ones(4, 3)
    assert alignment(same, 2 * same) == 0
    assert alignment(same, -same) == pytest.approx(4)
    assert uniformity(same) == pytest.approx(0, abs=1e-12)
    assert uniformity(torch.eye(7)) == pytest.approx(-4)
    assert uniformity(torch.tensor([[1.0, 0], [-1, 0]])) == pytest.approx(-8)


def test_a_collapse_to_zero_is_not_spread():
    assert uniformity(torch.zeros(5, 3)) == 0


def test_the_evaluator_takes_pairs_and_distinct_texts():
    first, second = ["a b", "c d", "a b"], ["a c", "c d", "e f"]
    encode = Counted()
    found = AlignmentUniformity(Listed({"x": first, "y": second, "z": ["unused"] * 3}), "toy")(encode)
    assert set(found) == {"alignment_uniformity/toy/alignment", "alignment_uniformity/toy/uniformity"}
    assert found["alignment_uniformity/toy/alignment"] == pytest.approx(alignment(words(first), words(second)))
    distinct = ["a b", "c d", "a c", "e f"]
    assert found["alignment_uniformity/toy/uniformity"] == pytest.approx(uniformity(words(distinct)))
    assert [sorted(call) for call in encode.calls] == [sorted(distinct)]


def test_one_column_is_halved():
    halved = AlignmentUniformity(Listed({"text": ["a b c d", "e f g h i"]}), "toy")(words)
    paired = AlignmentUniformity(Listed({"x": ["a b", "e f"], "y": ["c d", "g h i"]}), "toy")(words)
    assert halved == paired


def test_equal_texts_only():
    with pytest.raises(InputError, match="all held-out texts are equal"):
        AlignmentUniformity(Listed({"x": ["a"] * 3, "y": ["a"] * 3}), "toy")(words)


def test_no_held_out_rows():
    with pytest.raises(InputError, match="source is not set: toy has none"):
        AlignmentUniformity(None, "toy")
