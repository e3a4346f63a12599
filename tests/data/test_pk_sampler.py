"""PKBatchSampler: the paper's batch, the same for any number of processes, and messages for what cannot be drawn."""

import logging
from collections import Counter
from itertools import chain

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tercet.data import samplers as batches_module
from tercet.data.samplers import PKBatchSampler
from tercet.errors import InputError
from tests.conftest import Ids


def drawn(sampler, rank=0, world=1):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches_module, "rank", lambda: rank)
        patch.setattr(batches_module, "world_size", lambda: world)
        return list(sampler)


def make(sizes, batch_size, per_label, distractors=0, singles=0, unlabeled=0, seed=1):
    """Rows of ``len(sizes)`` labels, then labels that occur once, then rows without."""
    label = [name for name, size in enumerate(sizes) for _ in range(size)]
    label += [1000 + i for i in range(singles)] + [-1] * unlabeled
    return PKBatchSampler(Ids(torch.tensor(label)), batch_size, seed, per_label, distractors)


@settings(deadline=None, max_examples=30)
@given(
    sizes=st.lists(st.integers(2, 9), min_size=2, max_size=12),
    per_label=st.integers(2, 6),
    distractors=st.integers(0, 5),
    singles=st.integers(0, 8),
    world=st.integers(1, 4),
    epoch=st.integers(0, 3),
)
def test_batches_are_full_and_the_same_for_any_number_of_processes(sizes, per_label, distractors, singles, world, epoch):
    room = sum(min(per_label, size) for size in sizes)
    size = distractors + max(2, room // 2)
    assume(sum(sizes) + singles >= 2 * size)
    sampler = make(sizes, size, per_label, distractors, singles)
    sampler.set_epoch(epoch)
    alone = drawn(sampler)
    parts = list(zip(*(drawn(sampler, r, world) for r in range(world)), strict=True))
    assert [list(chain(*(p.rows for p in step))) for step in parts] == [draw.rows for draw in alone]
    assert all({p.seed for p in step} == {draw.seed} for step, draw in zip(parts, alone, strict=True))
    assert len(alone) == len(sampler) == max(1, sampler.size // size)
    for draw in alone:
        assert len(set(draw.rows)) == len(draw.rows) == size
        counts = Counter(sampler.values[row] for row in draw.rows)
        paired = sum(count for count in counts.values() if count >= 2)
        all_labels = set(counts) == set(sampler.values.tolist())
        assert max(counts.values()) <= max(per_label, distractors + 1) or all_labels
        assert paired >= size - distractors - 1


def test_facenets_batch():
    sampler = make([60] * 50, 1800, 40)
    for draw in drawn(sampler):
        counts = Counter(sampler.values[row] for row in draw.rows)
        assert len(counts) == 45
        assert set(counts.values()) == {40}


def test_facenets_batch_with_random_negatives():
    """40 people with 40 faces each, and 200 faces of others, none of which has a positive."""
    sampler = make([60] * 300, 1800, 40, distractors=200)
    for _, draw in zip(range(2), drawn(sampler), strict=False):
        counts = Counter(sampler.values[row] for row in draw.rows)
        assert Counter(counts.values()) == {40: 40, 1: 200}


def test_every_label_comes_before_any_comes_again():
    sampler = make([4] * 12, 8, 2)
    batches = [Counter(int(sampler.values[row]) for row in draw.rows) for draw in drawn(sampler)]
    assert all(list(batch.values()) == [2] * 4 for batch in batches)
    for start in (0, 3):
        assert set().union(*batches[start : start + 3]) == set(range(12))


def test_a_labels_rows_all_come_before_one_comes_again():
    sampler = make([6, 6], 4, 2)
    rows = [row for _, draw in zip(range(3), drawn(sampler), strict=False) for row in draw.rows]
    assert sorted(rows) == list(range(12))


def test_distractors_are_rows_that_have_no_positive():
    sampler = make([4] * 6, 10, 2, distractors=4, singles=10, unlabeled=10)
    for draw in drawn(sampler):
        counts = Counter(int(sampler.values[row]) for row in draw.rows)
        assert sum(count for name, count in counts.items() if name in range(6)) == 6
        assert all(counts[name] == 2 for name in range(6) if counts[name])


def test_distractors_come_from_other_labels_where_no_row_is_single():
    sampler = make([4] * 8, 8, 2, distractors=2)
    for draw in drawn(sampler):
        counts = Counter(int(sampler.values[row]) for row in draw.rows)
        assert sorted(counts.values(), reverse=True)[:3] == [2, 2, 2]
        assert sum(counts.values()) == 8


def test_epochs_and_seeds_differ_and_repeat():
    def order(seed, epoch):
        sampler = make([4] * 8, 8, 2, seed=seed)
        sampler.set_epoch(epoch)
        return tuple(tuple(draw.rows) for draw in drawn(sampler))

    assert len({order(seed, epoch) for seed in (1, 2) for epoch in (0, 1)}) == 4
    assert order(2, 1) == order(2, 1)


def test_confusable_labels_share_a_batch():
    sampler = make([4] * 20, 4, 2)
    sampler.neighbors = {name: [name ^ 1] for name in range(20)}  # 0 with 1, 2 with 3, ...
    for draw in drawn(sampler):
        first, second = {int(sampler.values[row]) for row in draw.rows}
        assert second == first ^ 1


def test_few_rows_of_each_label_are_said(caplog):
    with caplog.at_level(logging.WARNING, "tercet"):
        make([3] * 7, 6, 13)
    assert "per_label=13: the largest label has 3 rows" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(sizes=[4, 4], batch_size=4, per_label=1), "per_label=1: 2 or more"),
        (dict(sizes=[4, 4], batch_size=4, per_label=2, distractors=3), "distractors=3: from 0 to .* = 2"),
        (dict(sizes=[], batch_size=4, per_label=2, singles=9), "labels that occur twice or more.*label"),
        (dict(sizes=[], batch_size=4, per_label=2, unlabeled=9), "no labels. Name the column of labels"),
        (dict(sizes=[9], batch_size=4, per_label=2), "the same label, so that there are no negatives"),
        (dict(sizes=[4, 4], batch_size=6, per_label=2), "batch_size=6: 2 labels .* give 4 rows.*batch_size=4"),
    ],
)
def test_what_cannot_be_is_explained(options, message):
    with pytest.raises(InputError, match=message):
        make(**options)
