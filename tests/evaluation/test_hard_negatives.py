"""Hard negatives against a search without any cleverness."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tercet.errors import InputError
from tercet.evaluation import search
from tercet.evaluation.search import FalseNegativeFilter, hard_negatives


def plain(anchors, keys, allowed, limit, k):
    """One anchor and one key at a time."""
    for i, anchor in enumerate(anchors):
        fine = [
            (float(anchor @ key), j)
            for j, key in enumerate(keys)
            if allowed(torch.tensor([i]), torch.tensor([[j]])).item() and anchor @ key <= limit[i]
        ]
        yield sorted(fine, reverse=True)[:k]


@given(
    seed=st.integers(0, 999),
    count=st.integers(1, 12),
    pool=st.integers(1, 30),
    k=st.integers(1, 5),
    top=st.sampled_from([-0.5, 0.2, 0.7, 2.0]),
    depth=st.sampled_from([1, 4, 32]),
)
def test_the_nearest_that_are_allowed(seed, count, pool, k, top, depth):
    g = torch.Generator().manual_seed(seed)
    anchors, keys = (F.normalize(torch.randn(n, 4, generator=g, dtype=torch.float64), dim=-1) for n in (count, pool))
    own, group = torch.randint(0, 3, (count,), generator=g), torch.randint(0, 3, (pool,), generator=g)

    def allowed(rows, at):
        return group[at] != own[rows, None]

    limit = torch.full((count,), top, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "DEPTH", depth)  # looked for in several rounds
        scores, at = hard_negatives(anchors, keys, allowed, limit, k)
    for i, expected in enumerate(plain(anchors, keys, allowed, limit, k)):
        assert at[i].tolist() == [j for _, j in expected] + [-1] * (k - len(expected))
        assert scores[i, : len(expected)].tolist() == pytest.approx([score for score, _ in expected], abs=1e-6)
        assert bool((scores[i, len(expected) :] == -torch.inf).all())


def test_the_guard():
    positive = torch.tensor([0.8, -0.5, torch.nan])
    assert FalseNegativeFilter(1, None).limit(positive).tolist() == [2.0, 2.0, 2.0]
    assert FalseNegativeFilter(0.9, None).limit(positive).tolist() == pytest.approx([0.9] * 3)
    assert FalseNegativeFilter(0.9, 0.1).limit(positive).tolist() == pytest.approx([0.72, -0.55, 0.9])
    assert FalseNegativeFilter(0.6, 0.1).limit(positive).tolist() == pytest.approx([0.6, -0.55, 0.6])


@pytest.mark.parametrize(("values", "key"), [((1.5, None), "max_similarity=1.5"), ((0.9, 1.0), "relative_margin=1.0")])
def test_guards_that_make_no_sense(values, key):
    with pytest.raises(InputError, match=key):
        FalseNegativeFilter(*values)
