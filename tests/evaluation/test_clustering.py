import logging
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.cluster.hierarchy import fcluster
from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score

from tercet.errors import InputError
from tercet.evaluation import Clustering
from tercet.evaluation.clustering import agreement, bcubed_after_merges, best_threshold, linkage_tree
from tests.evaluation.fakes import Counted, broken, collapsed, noise
from tests.evaluation.test_nearest_neighbor import AXES, distinct, source, vectors


def measure(rows, encode=vectors, *, max_items=5000, threshold=None, images=False, name="toy"):
    found = Clustering(source(rows, images), threshold, max_items, name)(encode)
    return {metric.removeprefix(f"clustering/{name}/"): value for metric, value in found.items()}


def bcubed(cluster, label):
    """An item at a time."""
    items = range(len(label))
    precision = recall = 0.0
    for i in items:
        beside = [j for j in items if cluster[j] == cluster[i]]
        alike = [j for j in items if label[j] == label[i]]
        both = len(set(beside) & set(alike))
        precision += both / len(beside) / len(label)
        recall += both / len(alike) / len(label)
    return precision, recall, 2 * precision * recall / (precision + recall)


def agglomerated(z, threshold):
    """The two clusters of the smallest mean distance become one, until it is above the threshold."""
    distance = ((z[:, None] - z) ** 2).sum(-1)
    clusters = [[i] for i in range(len(z))]
    while len(clusters) > 1:
        pairs = [(a, b) for a in range(len(clusters)) for b in range(a)]
        means = [np.mean([distance[i, j] for i in clusters[a] for j in clusters[b]]) for a, b in pairs]
        if min(means) > threshold:
            break
        a, b = pairs[int(np.argmin(means))]
        clusters[b] += clusters.pop(a)
    return np.array([next(c for c, members in enumerate(clusters) if i in members) for i in range(len(z))])


def sphere(seed, count, dim=3):
    z = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(z, dim=-1)


SIDES = st.lists(st.tuples(st.integers(0, 5), st.integers(-3, 3)), min_size=2, max_size=40)


BCUBED = ("bcubed_precision", "bcubed_recall", "bcubed_f")


@given(sides=SIDES)
def test_agreement_is_sklearns_and_bcubed_the_definition(sides):
    cluster, label = (np.array(side) for side in zip(*sides, strict=True))
    found = agreement(cluster, label)
    assert [found[name] for name in BCUBED] == pytest.approx(bcubed(cluster, label))
    assert (found["clusters"], found["labels"]) == (len(set(cluster)), len(set(label)))
    trivial = [len(set(side)) in (1, len(label)) for side in (cluster, label)]
    if not any(trivial):  # there sklearn returns 1 or 0 by cases, and chance leaves nothing to gain
        assert found["nmi"] == pytest.approx(normalized_mutual_info_score(label, cluster), abs=1e-9)
        assert found["ami"] == pytest.approx(adjusted_mutual_info_score(label, cluster), abs=1e-9)


@given(sides=SIDES, seed=st.integers(0, 99))
def test_agreement_knows_no_names_and_no_order(sides, seed):
    cluster, label = (np.array(side) for side in zip(*sides, strict=True))
    order = np.random.default_rng(seed).permutation(len(label))
    found = agreement(cluster, label)
    assert agreement(7 - 2 * cluster[order], label[order] * 10) == pytest.approx(found)
    swapped = agreement(label, cluster)
    assert (swapped["nmi"], swapped["ami"]) == pytest.approx((found["nmi"], found["ami"]))


def test_agreement_of_a_thousand_items_and_of_nothing():
    rng = np.random.default_rng(0)
    cluster, label = rng.integers(0, 90, 1000), rng.integers(0, 70, 1000)
    found = agreement(cluster, label)
    assert found["ami"] == pytest.approx(adjusted_mutual_info_score(label, cluster), abs=1e-9)
    assert abs(found["ami"]) < 0.05 < found["nmi"]
    one, each = np.zeros(6, dtype=int), np.arange(6)
    for a, b in ((one, label[:6]), (each, label[:6]), (one, each)):
        assert agreement(a, b)["ami"] == 0
    assert agreement(one, one)["nmi"] == 0


@given(seed=st.integers(0, 999), count=st.integers(2, 14), threshold=st.floats(0, 4))
def test_the_tree_is_the_twin(seed, count, threshold):
    z = sphere(seed, count)
    ours = fcluster(linkage_tree(z), threshold, "distance")
    theirs = agglomerated(z.numpy(), threshold)
    assert np.array_equal(ours[:, None] == ours, theirs[:, None] == theirs)


def test_the_tree_reads_every_block():
    z = sphere(0, 600, 8)
    from scipy.cluster.hierarchy import linkage

    assert linkage_tree(z)[:, 2] == pytest.approx(linkage(z.numpy(), "average", metric="sqeuclidean")[:, 2])


@given(seed=st.integers(0, 999), count=st.integers(2, 14), values=st.sampled_from([2, 1000]))
def test_no_threshold_is_better(seed, count, values):
    """Also where many distances are equal."""
    rng = np.random.default_rng(seed)
    z = sphere(seed, values)[torch.from_numpy(rng.integers(0, values, count))]
    label = rng.integers(0, 3, count)
    merges = linkage_tree(z)

    def f(threshold):
        return bcubed(fcluster(merges, threshold, "distance"), label)[2]

    cuts = [-1.0, *merges[:, 2]]
    assert f(best_threshold(merges, label)) == pytest.approx(max(f(t) for t in cuts))
    poured = bcubed_after_merges(label, merges[:, :2].astype(np.int64))
    assert [poured[0], poured[-1]] == pytest.approx([f(-1.0), f(9.0)])


def clouds(labels, each, spread=0.05):
    """Items around axes of their labels; the second half of the labels like the first."""
    rng = np.random.default_rng(0)
    axes = np.eye(labels)
    return [
        (f"{label}-{i} " + " ".join(f"{x:.4f}" for x in axes[label] + spread * rng.standard_normal(labels)), label)
        for label in range(labels)
        for i in range(each)
    ]


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("threshold", [None, 0.5])
def test_clouds_are_found(images, threshold):
    found = measure(clouds(8, 5), threshold=threshold, images=images)
    used = 8 if threshold else 4
    assert (found["labels"], found["clusters"]) == (used, used)
    for metric in ("bcubed_precision", "bcubed_recall", "bcubed_f", "nmi", "ami"):
        assert found[metric] == pytest.approx(1)
    assert 0.05 < found["threshold"] < 2


def test_a_given_threshold_is_used_as_it_is():
    rows = [("a 1 0", 0), ("b 1 0.1", 0), ("c 0 1", 1), ("d 0.1 1", 0)]
    found = measure(rows, threshold=0.5)
    assert found["threshold"] == 0.5
    items = list(distinct(rows).items())
    z = torch.nn.functional.normalize(vectors([item for item, _ in items]).double(), dim=-1)
    expected = bcubed(agglomerated(z.numpy(), 0.5), [label for _, label in items])
    assert [found[f"bcubed_{x}"] for x in ("precision", "recall", "f")] == pytest.approx(expected)
    assert (measure(rows, threshold=0)["clusters"], measure(rows, threshold=4)["clusters"]) == (4, 1)


def test_the_threshold_is_of_other_labels_than_those_measured():
    """Halves of the labels: what is measured has no say in its threshold."""
    rows, other = clouds(8, 5), clouds(8, 5, spread=0.0)
    evaluator = Clustering(source(rows))
    label = torch.tensor([label for _, label in rows])
    measured = evaluator._half(label, "")
    mixed = [b if m else a for a, b, m in zip(rows, other, measured.tolist(), strict=True)]
    # Other vectors of the measured labels, each a different text: the threshold stays.
    mixed = [(f"{i}{item}", label) for i, (item, label) in enumerate(mixed)]
    assert measure(mixed)["threshold"] == pytest.approx(measure(rows)["threshold"])
    assert measured.float().mean() == 0.5


@given(order=st.permutations(range(24)))
def test_the_order_of_the_rows_changes_nothing(order):
    rows = [(f"{i} {AXES[i % 5]}", i % 6) for i in range(24)]
    assert measure([rows[i] for i in order]) == measure(rows)


def test_each_item_is_encoded_once_and_the_unlabeled_not_at_all(caplog):
    encode = Counted(vectors)
    rows = clouds(4, 3)
    with caplog.at_level(logging.WARNING, "tercet"):
        found = measure([*rows, *rows, ("bare 1 0 0 0", -1)], encode, name="bare")
    assert [len(call) for call in encode.calls] == [12]
    assert found == measure(rows)
    assert "1 of 13 items have no label and are left out" in caplog.text


def test_whole_labels_are_left_out_where_there_are_too_many_items(caplog):
    with caplog.at_level(logging.WARNING, "tercet"):
        found = measure(clouds(6, 4), max_items=11, threshold=0.5, name="many")
    assert found["labels"] == 2
    assert "8 of 24 items are used, 2 whole labels (max_items)." in caplog.text


@pytest.mark.parametrize("encode", [collapsed, noise, lambda items: torch.zeros(len(items), 3)])
def test_what_knows_nothing_is_chance(encode):
    rows = [(f"text {i}", i % 20) for i in range(200)]
    for threshold in (None, 0.5):
        found = measure(rows, encode, threshold=threshold)
        assert all(math.isfinite(value) for value in found.values())
        assert found["ami"] == pytest.approx(0, abs=0.1)


def test_embeddings_that_are_no_numbers():
    with pytest.raises(InputError, match="clustering of toy: 12 of 12 embeddings are not finite"):
        measure(clouds(4, 3), broken)


@pytest.mark.parametrize(("rows", "options", "message"), [
    ([("a 1", 0), ("b 1", 1), ("c 1", 2)], {}, "3 items of 3 labels, 0 of them repeated.*max_items"),
    ([("a 1", 0), ("b 1", 0), ("c 1", -1)], {"threshold": 1.0}, "2 items of 1 labels"),
    (clouds(6, 4), {"max_items": 4}, "4 items of 1 labels.*raise max_items"),
    (clouds(3, 4), {}, "3 labels, 3 of them repeated, cannot be halved.*Set threshold"),
    ([("a 1", -1), ("b 1", -1)], {}, "0 items of 0 labels"),
])  # fmt: skip
def test_labels_that_ask_nothing(rows, options, message):
    with pytest.raises(InputError, match=message):
        measure(rows, **options)


@pytest.mark.parametrize(
    ("max_items", "threshold", "key"), [(1, None, "max_items"), (9, -0.1, "threshold"), (9, 4.1, "threshold")]
)
def test_bad_settings(max_items, threshold, key):
    with pytest.raises(InputError, match=f"{key}="):
        measure(clouds(4, 3), max_items=max_items, threshold=threshold)
