import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tercet.evaluation.search import nearest


def brute(queries, keys, k, own=None):
    """By the definition: all keys but the own one, by falling score, then by rising index."""
    scores, indices = [], []
    for i, query in enumerate(queries.tolist()):
        products = [sum(a * b for a, b in zip(query, key, strict=True)) for key in keys.tolist()]
        order = sorted((-s, j) for j, s in enumerate(products) if own is None or j != int(own[i]))
        order = (order + [(float("inf"), -1)] * k)[:k]
        scores.append([-s for s, _ in order])
        indices.append([j for _, j in order])
    return torch.tensor(scores), torch.tensor(indices)


@given(
    seed=st.integers(0, 999),
    q=st.integers(1, 9),
    m=st.integers(1, 12),
    k=st.integers(1, 15),
    block=st.integers(1, 10),
    values=st.sampled_from([1, 2, 50]),
    excluding=st.booleans(),
)
def test_it_is_brute_force_in_any_block_with_ties(seed, q, m, k, block, values, excluding):
    rng = torch.Generator().manual_seed(seed)
    queries, keys = (torch.randint(-values, values + 1, (n, 3), generator=rng).float() for n in (q, m))
    own = torch.randint(-1, m, (q,), generator=rng) if excluding else None
    scores, indices = nearest(queries, keys, k, own=own, block=block)
    expected = brute(queries, keys, k, own)
    assert indices.tolist() == expected[1].tolist()
    assert scores.tolist() == expected[0].tolist()


def test_the_own_key_is_left_out_by_its_index_and_not_by_its_rank():
    keys = torch.tensor([[1.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    assert nearest(keys, keys, 1, own=torch.arange(3))[1].squeeze(1).tolist() == [2, 2, 0]
    assert nearest(keys, keys, 2, own=torch.tensor([-1, 1, 2]))[1].tolist() == [[2, 0], [2, 0], [0, 1]]


def test_no_keys_and_no_queries():
    scores, indices = nearest(torch.ones(2, 3), torch.ones(0, 3), 2)
    assert (scores.tolist(), indices.tolist()) == ([[-torch.inf] * 2] * 2, [[-1, -1]] * 2)
    assert nearest(torch.ones(0, 3), torch.ones(2, 3), 2)[1].shape == (0, 2)


def test_what_is_no_number_is_not_found():
    keys = torch.tensor([[torch.nan], [1.0], [2.0]])
    assert nearest(torch.ones(1, 1), keys, 3)[1].tolist() == [[2, 1, -1]]


def test_it_keeps_the_type_and_leaves_its_inputs_alone():
    keys = torch.randn(20, 4, dtype=torch.float64)
    copy = keys.clone()
    assert nearest(keys, keys, 3, own=torch.arange(20))[0].dtype == torch.float64
    assert torch.equal(keys, copy)


@pytest.mark.parametrize(("k", "block"), [(0, 1), (1, 0)])
def test_bad_numbers(k, block):
    with pytest.raises(ValueError, match="must be at least 1"):
        nearest(torch.ones(1, 1), torch.ones(1, 1), k, block=block)


@pytest.mark.gpu
def test_a_gpu_finds_the_same():
    keys = torch.randint(-3, 4, (500, 8)).float()
    expected = nearest(keys, keys, 20, own=torch.arange(500))
    found = nearest(keys.cuda(), keys.cuda(), 20, own=torch.arange(500).cuda(), block=64)
    assert torch.equal(found[1].cpu(), expected[1])
