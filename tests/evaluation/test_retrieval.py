import logging
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.retrieval import (
    retrieval_average_precision,
    retrieval_hit_rate,
    retrieval_normalized_dcg,
    retrieval_reciprocal_rank,
)

from tercet.errors import InputError
from tercet.evaluation import Retrieval
from tercet.evaluation.retrieval import query_metrics, relevant_ranks
from tests.evaluation.fakes import Counted, Listed, broken, collapsed, noise, words


def means(ranks, ks):
    return {name: float(values.mean()) for name, values in query_metrics(ranks, ks).items()}


def world(seed, queries, documents, most=4):
    """Random vectors and, for each query, 1 to ``most`` relevant documents."""
    rng = torch.Generator().manual_seed(seed)
    x, y = torch.randn(queries, 6, generator=rng), torch.randn(documents, 6, generator=rng)
    counts = torch.randint(1, min(most, documents) + 1, (queries,), generator=rng)
    return x, y, [torch.randperm(documents, generator=rng)[:count].tolist() for count in counts]


def brute_ranks(x, y, relevant):
    """By the definition, one query and one document at a time."""
    out = []
    for row, mine in zip(F.cosine_similarity(x[:, None], y[None], dim=-1), relevant, strict=True):
        others = [float(s) for j, s in enumerate(row) if j not in mine]
        own = sorted((float(row[j]) for j in mine), reverse=True)
        out.append([i + sum(other >= s - 1e-6 for other in others) for i, s in enumerate(own, start=1)])
    return out


@given(seed=st.integers(0, 999), queries=st.integers(1, 12), documents=st.integers(1, 15), block=st.integers(1, 13))
def test_ranks_are_those_of_the_definition_in_any_block(seed, queries, documents, block):
    x, y, relevant = world(seed, queries, documents)
    assert [r.tolist() for r in relevant_ranks(x, y, relevant, block)] == brute_ranks(x, y, relevant)


@given(seed=st.integers(0, 999))
def test_ranks_with_ties(seed):
    """Documents come in equal copies: an irrelevant copy stands before the relevant one."""
    x, y, relevant = world(seed, 5, 6)
    y = torch.cat([y, y])
    assert [r.tolist() for r in relevant_ranks(x, y, relevant)] == brute_ranks(x, y, relevant)
    assert all(r[0] >= 2 for r in relevant_ranks(x, y, relevant))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), most=st.sampled_from([1, 4, 15]))
def test_metrics_are_those_of_torchmetrics(seed, most):
    x, y, relevant = world(seed, 7, 15, most)
    cosine = F.cosine_similarity(x[:, None], y[None], dim=-1) + 1  # torchmetrics' nDCG wants no negative score
    target = torch.zeros(7, 15, dtype=torch.bool)
    for row, mine in zip(target, relevant, strict=True):
        row[mine] = True
    expected = {
        "recall@1": lambda p, t: retrieval_hit_rate(p, t, 1),
        "recall@3": lambda p, t: retrieval_hit_rate(p, t, 3),
        "mrr": retrieval_reciprocal_rank,
        "ndcg@10": lambda p, t: retrieval_normalized_dcg(p, t, 10),
        "map": retrieval_average_precision,
    }
    found = means(relevant_ranks(x, y, relevant), [1, 3])
    assert found.keys() == expected.keys()
    for name, measure in expected.items():
        mean = sum(float(measure(p, t)) for p, t in zip(cosine, target, strict=True)) / 7
        assert found[name] == pytest.approx(mean, abs=1e-5), name


def test_a_known_case():
    found = means([torch.tensor([2, 4]), torch.tensor([1])], [1, 2])
    assert found["recall@1"] == 0.5
    assert found["recall@2"] == 1
    assert found["mrr"] == 0.75
    assert found["map"] == pytest.approx((0.5 + 1) / 2)
    ideal = 1 + 1 / math.log2(3)
    assert found["ndcg@10"] == pytest.approx(((1 / math.log2(3) + 1 / math.log2(5)) / ideal + 1) / 2)


def test_ndcg_stops_at_ten():
    assert means([torch.tensor([11])], [1])["ndcg@10"] == 0
    assert means([torch.arange(1, 31)], [1])["ndcg@10"] == pytest.approx(1)


N = 60
PAIRS = Listed({"q": [f"query {i}" for i in range(N)], "d": [f"document {i}" for i in range(N)]})


@pytest.mark.parametrize("encode", [collapsed, broken, lambda texts: torch.zeros(len(texts), 4)])
def test_a_model_that_tells_nothing_apart_finds_nothing(encode):
    found = Retrieval(PAIRS, [1, 10, N], "toy")(encode)
    assert found["retrieval/toy/recall@1"] == found["retrieval/toy/recall@10"] == 0
    assert found["retrieval/toy/mrr"] == pytest.approx(1 / N)
    assert found[f"retrieval/toy/recall@{N}"] == 1


def test_a_score_that_is_no_number_is_the_lowest():
    x, y = torch.eye(3), torch.eye(3)
    y[1] = torch.nan
    assert [r.tolist() for r in relevant_ranks(x, y, [[0], [1], [2]])] == [[1], [3], [1]]


def test_perfect_and_random():
    twins = Listed({"q": [f"t {i}" for i in range(N)], "d": [f"t {i}" for i in range(N)]})
    found = Retrieval(twins, [1], "toy")(noise)
    assert set(found.values()) == {1.0}
    assert 0 < Retrieval(PAIRS, [10], "toy")(noise)["retrieval/toy/recall@10"] < 0.5


def test_names():
    found = Retrieval(PAIRS, [1, 10], "toy")(words)
    assert set(found) == {f"retrieval/toy/{m}" for m in ("recall@1", "recall@10", "mrr", "ndcg@10", "map")}


def relevant_of(table):
    queries, documents, relevant = Retrieval(Listed(table), [1], "toy")._texts()
    return {q: {documents[j] for j in mine} for q, mine in zip(queries, relevant, strict=True)}


def test_equal_texts_are_one():
    found = relevant_of({"q": ["a", "a", "b"], "d": ["x", "y", "x"], "more": ["", "", ""]})
    assert found == {"a": {"x", "y"}, "b": {"x"}}


def test_labels_make_relevant():
    table = {"q": ["a", "b", "c", "d"], "d": ["w", "x", "y", "z"], "label": [7, -1, 7, -1]}
    assert relevant_of(table) == {"a": {"w", "y"}, "b": {"x"}, "c": {"w", "y"}, "d": {"z"}}


def test_duplicates_do_not_compete():
    """Every row finds its document although each is there twice."""
    table = {"q": ["a b", "c d"] * 2, "d": ["a b e", "c d f"] * 2}
    assert Retrieval(Listed(table), [1], "toy")(words)["retrieval/toy/recall@1"] == 1


def test_each_text_goes_to_encode_once_a_side():
    encode = Counted()
    Retrieval(Listed({"q": ["a", "a", "b"], "d": ["x", "y", "x"]}), [1], "toy")(encode)
    assert [sorted(call) for call in encode.calls] == [["a", "b", "x", "y"]]


def test_one_column_is_halved_and_short_texts_are_said(caplog):
    texts = ["a b c d", "too short now", "e f g h i", "", "j k l m"]
    with caplog.at_level(logging.WARNING, "tercet"):
        evaluator = Retrieval(Listed({"text": texts}), [1], "halves")
        assert evaluator._texts() == (["a b", "e f", "j k"], ["c d", "g h i", "l m"], [[0], [1], [2]])
        evaluator._texts()
    said = [r.message for r in caplog.records]
    assert said == ["retrieval of halves: 2 of 5 held-out texts have fewer than 4 words and are left out."]
    with pytest.raises(InputError, match="found by its halves, which takes 4 words: give two columns"):
        Retrieval(Listed({"text": ["red apple", "blue car"]}), [1], "halves")._texts()


def test_halves_keep_their_labels():
    table = {"text": ["short", "a b c d", "e f g h"], "label": [3, 5, 5]}
    assert relevant_of(table) == {"a b": {"c d", "g h"}, "e f": {"c d", "g h"}}


@pytest.mark.parametrize("ks", [[], [0], [1, -2], [1.5], ["1"], "10", [True]])
def test_bad_ks(ks):
    with pytest.raises(InputError, match=r"ks=.*a list of ranks from 1 on"):
        Retrieval(PAIRS, ks, "toy")


@pytest.mark.parametrize("name", ["", "a/b"])
def test_bad_names(name):
    with pytest.raises(InputError, match=r"name="):
        Retrieval(PAIRS, [1], name)


def test_no_held_out_rows():
    with pytest.raises(InputError, match=r"retrieval of wiki1m needs held-out rows.*such as STS"):
        Retrieval(None, [1], "wiki1m")


@pytest.mark.parametrize("table", [{"q": ["a"], "d": ["b"]}, {"text": ["a b c d", "a b c"]}])
def test_too_few_pairs(table):
    with pytest.raises(InputError, match=r"retrieval of toy: 1 held-out pairs.*source.held_out"):
        Retrieval(Listed(table), [1], "toy")(words)
