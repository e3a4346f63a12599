import logging
import math
from dataclasses import dataclass

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tercet.errors import InputError
from tercet.evaluation import NearestNeighbor
from tercet.evaluation.inputs import item_hash
from tests.evaluation.fakes import Counted, Listed, broken, collapsed, noise


def vectors(items):
    """Items say their vector: `name 1 0 -1`, as text or as bytes."""
    said = (item if isinstance(item, str) else item.decode() for item in items)
    return torch.tensor([[float(x) for x in text.split()[1:]] for text in said])


def source(rows, images=False):
    cells = [{"bytes": item.encode(), "path": None} if images else item for item, _ in rows]
    return Listed({"image" if images else "text": cells, "label": [label for _, label in rows]})


def measure(rows, encode=vectors, *, reference=None, ks=(1, 3), neighbors=3, images=False, name="toy"):
    pool = None if reference is None else source(reference, images)
    found = NearestNeighbor(source(rows, images), pool, list(ks), neighbors, name)(encode)
    return {metric.removeprefix(f"nearest_neighbor/{name}/"): value for metric, value in found.items()}


def distinct(rows):
    """Each content once; -1 where its labels differ or are none."""
    labels = {}
    for item, label in rows:
        labels.setdefault(item, set()).update({label} - {-1})
    return {item: next(iter(found)) if len(found) == 1 else -1 for item, found in labels.items()}


def cosine(a, b):
    x, y = ([float(v) for v in item.split()[1:]] for item in (a, b))
    return sum(p * q for p, q in zip(x, y, strict=True)) / math.hypot(*x) / math.hypot(*y)


def elected(near):
    """The most frequent label; then the larger sum of cosines; then the nearest."""
    voters = [(label, c) for c, label in near if label >= 0]
    if not voters:
        return None
    weight = {}
    for label, c in voters:
        count, total = weight.get(label, (0, 0.0))
        weight[label] = (count + 1, total + c)
    return max(weight, key=lambda label: (weight[label][0], round(weight[label][1], 5)))  # the first of equals


def twin(rows, reference=None, ks=(1, 3), neighbors=3):
    """By the definitions, a query at a time; None where there is no query."""
    queries = distinct(rows)
    pool = queries if reference is None else distinct(reference)
    sums, asked = {}, 0
    for item, label in queries.items():
        others = sorted((-round(cosine(item, o), 6), item_hash(o), other) for o, other in pool.items() if o != item)
        near = [(-c, other) for c, _, other in others]
        hits = [other == label for _, other in near]
        r = sum(hits)
        if label < 0 or r == 0:
            continue
        asked += 1
        row = {f"recall@{k}": float(any(hits[:k])) for k in ks}
        row["r_precision"] = sum(hits[:r]) / r
        row["map@r"] = sum(sum(hits[: i + 1]) / (i + 1) for i in range(r) if hits[i]) / r
        row["knn_accuracy"] = float(elected(near[:neighbors]) == label)
        for name, value in row.items():
            sums[name] = sums.get(name, 0.0) + value
    return {name: value / asked for name, value in sums.items()} if asked else None


AXES = [" ".join(map(str, axis)) for axis in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (-1, 0, 0), (0, -1, 0), (1, 0, 0))]
PLACES = st.sampled_from([*AXES, "1 2 3", "0.3 -1 0.7", "5 1 -2", "-1 -4 2"])
ROWS = st.lists(st.tuples(st.integers(0, 30), PLACES, st.integers(-1, 3)), min_size=2, max_size=25)


def spelled(drawn):
    return [(f"{number} {place}", label) for number, place, label in drawn]


@given(drawn=ROWS, neighbors=st.integers(1, 30), k=st.integers(1, 30), images=st.booleans())
def test_it_is_the_twin(drawn, neighbors, k, images):
    rows = spelled(drawn)
    expected = twin(rows, ks=(1, k), neighbors=neighbors)
    if expected is None or len(set(distinct(rows).values())) == 1:
        with pytest.raises(InputError, match="nearest_neighbor of toy"):
            measure(rows, ks=(1, k), neighbors=neighbors, images=images)
    else:
        assert measure(rows, ks=(1, k), neighbors=neighbors, images=images) == pytest.approx(expected)


@given(drawn=ROWS, more=ROWS)
def test_with_a_reference_it_is_the_twin(drawn, more):
    both = [(f"{i} {place}", i % 4) for i, place in enumerate(AXES)]  # both sides hold all labels
    rows, reference = [*both, *spelled(drawn)], [*both, *spelled(more)]
    labels = [set(distinct(side).values()) - {-1} for side in (rows, reference)]
    if labels[0] != labels[1]:
        with pytest.raises(InputError, match="reference"):
            measure(rows, reference=reference)
    else:
        assert measure(rows, reference=reference) == pytest.approx(twin(rows, reference))


@given(order=st.permutations(range(20)))
def test_the_order_of_the_rows_changes_nothing(order):
    rows = [(f"{i} {AXES[i % 5]}", i % 3) for i in range(20)]
    assert measure([rows[i] for i in order]) == measure(rows)


def test_a_number_by_hand():
    """Of three, at ranks 1, 3 and 4 of 4: R-precision 2/3, MAP@R (1 + 2/3) / 3."""
    rows = [("q 1 0", 0), ("a 1 0.1", 0), ("b 1 0.2", 1), ("c 1 0.3", 0), ("d 1 0.4", 0)]
    reference = [*rows[1:], ("e -1 0", 1)]
    found = measure([rows[0], ("f 0 -1", 1)], reference=reference, ks=(1,), neighbors=2)
    other = twin([("f 0 -1", 1)], reference, ks=(1,), neighbors=2)
    assert 2 * found["r_precision"] - other["r_precision"] == pytest.approx(2 / 3)
    assert 2 * found["map@r"] - other["map@r"] == pytest.approx((1 + 2 / 3) / 3)


def test_perfect_and_hopeless():
    good = [(f"{i} {AXES[i % 3]}", i % 3) for i in range(12)]
    assert set(measure(good).values()) == {1.0}
    bad = [(f"{i} {AXES[i % 3]}", i // 3) for i in range(12)]
    assert measure(bad, ks=(1,), neighbors=1) == dict.fromkeys(measure(bad, ks=(1,)), 0.0)


def test_copies_of_the_query_are_no_hits(caplog):
    rows = [("a 1 0", 0), ("a 1 0", 0), ("b 1 0.1", 1), ("c 0 1", 0), ("d 0 1.1", 1)]
    with caplog.at_level(logging.WARNING, "tercet"):
        assert measure(rows, name="copied") == pytest.approx(twin(rows))
    assert "1 of 5 items are copies" in caplog.text
    # A vector like the query's is another matter.
    assert measure([("a 1 0", 0), ("z 1 0", 0), ("b 0 1", 1), ("c 0 -1", 1)], ks=(1,), neighbors=1)["recall@1"] == 0.5


def test_a_query_does_not_find_itself_in_the_reference(caplog):
    rows = [("a 1 0", 0), ("b 1 0.1", 1), ("c 0 1", 1), ("d 1 0.2", 0)]
    with caplog.at_level(logging.WARNING, "tercet"):
        assert measure(rows, reference=rows, name="both") == measure(rows)
    assert "4 of 4 items are in the reference, too" in caplog.text


def test_those_who_are_no_queries_are_counted_and_stay_as_distractors(caplog):
    rows = [("a 1 0", 0), ("b 1 0.5", 0), ("lone 1 0.1", 7), ("bare 1 0.2", -1), ("c 0 1", 1), ("d 0 1.1", 1)]
    with caplog.at_level(logging.WARNING, "tercet"):
        found = measure(rows, ks=(1, 3), neighbors=1, name="lone")
    assert found == pytest.approx(twin(rows, neighbors=1))
    assert found["recall@1"] < found["recall@3"]
    assert "1 of 5 labeled items have a label that no other item has" in caplog.text
    assert "1 of 6 items have no label" in caplog.text


def test_an_item_of_two_labels_has_none(caplog):
    rows = [("a 1 0", 0), ("a 1 0", 1), ("b 1 0.1", 0), ("c 1 0.2", 0), ("d 0 1", 1), ("e 0 1.1", 1)]
    with caplog.at_level(logging.WARNING, "tercet"):
        assert measure(rows, name="torn") == pytest.approx(twin(rows))
    assert "1 items have several labels" in caplog.text


@dataclass(frozen=True)
class Named:
    """Labels with names, as image folders have them."""

    texts: list
    label: list
    names: list

    columns = ("text",)

    def rows(self):
        features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=self.names)})
        return datasets.Dataset.from_dict({"text": self.texts, "label": self.label}, features=features)

    def fingerprint(self):
        return "named"


def test_labels_with_names_are_matched_by_name():
    queries = Named(["q 1 0", "r 0 1", "s 1 1"], [0, 1, 2], ["cat", "dog", "yak"])  # nothing else is a yak
    pool = Named(["a 1 0.1", "b 0.1 1"], [1, 0], ["dog", "cat"])
    assert NearestNeighbor(queries, pool, [1], 1, "toy")(vectors)["nearest_neighbor/toy/recall@1"] == 1


def test_each_item_is_encoded_once():
    encode = Counted(vectors)
    rows = [(f"{i} {AXES[i % 5]}", i % 3) for i in range(9)]
    measure([*rows, *rows], encode)
    assert [len(call) for call in encode.calls] == [9]


@pytest.mark.parametrize("encode", [collapsed, noise])
def test_what_knows_nothing_is_chance(encode):
    rows = [(f"text {i}", i % 2) for i in range(400)]
    found = measure(rows, encode, ks=(1,))
    assert all(0.4 < found[name] < 0.6 for name in ("recall@1", "r_precision", "knn_accuracy"))


def test_embeddings_that_are_no_numbers():
    with pytest.raises(InputError, match="nearest_neighbor of toy: 4 of 4 embeddings are not finite"):
        measure([(f"{i} 1 0", i % 2) for i in range(4)], broken)


@pytest.mark.parametrize(("labels", "message"), [
    ([0, 1, 2, 3], "none of 4 items has a label that another item has.*column of labels"),
    ([-1] * 4, "none of 4 items has a label"),
    ([5] * 4, "all items have one label"),
])  # fmt: skip
def test_labels_that_ask_nothing(labels, message):
    with pytest.raises(InputError, match=message):
        measure([(f"{i} 1 0", label) for i, label in enumerate(labels)])


def test_no_labels_at_all():
    with pytest.raises(InputError, match=r"needs labels, but the source has only the columns text.*Set source.label"):
        NearestNeighbor(Listed({"text": ["a 1", "b 2"]}), None, [1], 1)(vectors)


def test_an_image_that_is_gone_is_named(tmp_path):
    cells = [{"bytes": b"a 1 0", "path": None}, {"bytes": None, "path": str(tmp_path / "gone.jpg")}]
    with pytest.raises(InputError, match=r"the image of row 2 cannot be read.*gone.jpg"):
        NearestNeighbor(Listed({"image": cells, "label": [0, 0]}), None, [1], 1)(vectors)


@pytest.mark.parametrize(("name", "ks", "neighbors", "key"), [
    ("toy", [], 1, "ks"), ("toy", [0], 1, "ks"), ("toy", ["1"], 1, "ks"),
    ("toy", [1], 0, "neighbors"), ("a/b", [1], 1, "name"),
])  # fmt: skip
def test_bad_settings(name, ks, neighbors, key):
    with pytest.raises(InputError, match=key):
        NearestNeighbor(source([("a 1", 0)]), None, ks, neighbors, name)


def test_no_held_out_rows():
    with pytest.raises(InputError, match="source is not set"):
        NearestNeighbor(None)
