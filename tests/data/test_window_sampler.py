"""WindowBatchSampler: windows of one document, each row once, the same for any number of processes."""

import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tercet.data import WindowBatchSampler
from tercet.errors import InputError
from tests.conftest import Ids
from tests.data.test_pk_sampler import drawn


def make(lengths, batch_size, window, seed=1, shuffled=False):
    label = torch.tensor([d for d, n in enumerate(lengths) for _ in range(n)])
    position = torch.tensor([10 * i for n in lengths for i in range(n)])  # gaps are allowed
    if shuffled:
        order = torch.randperm(len(label), generator=torch.Generator().manual_seed(seed))
        label, position = label[order], position[order]
    return WindowBatchSampler(Ids(label, position), batch_size, seed, window), label, position


@settings(max_examples=50)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    window=st.integers(2, 7),
    k=st.integers(1, 3),
    world=st.integers(1, 4),
    epoch=st.integers(0, 3),
    shuffled=st.booleans(),
)
def test_a_batch_is_whole_windows(lengths, window, k, world, epoch, shuffled):
    count = sum(n // window for n in lengths)
    if count < k:
        with pytest.raises(InputError):
            make(lengths, k * window, window)
        return
    sampler, label, position = make(lengths, k * window, window, shuffled=shuffled)
    sampler.set_epoch(epoch)
    alone = [draw.rows for draw in drawn(sampler)]
    parts = zip(*(drawn(sampler, r, world) for r in range(world)), strict=True)
    assert [[row for part in step for row in part.rows] for step in parts] == alone
    assert len(alone) == len(sampler) == count // k
    seen = [row for rows in alone for row in rows]
    assert len(set(seen)) == len(seen)
    for rows in alone:
        for start in range(0, len(rows), window):
            part = rows[start : start + window]
            assert len(set(label[part].tolist())) == 1
            assert (np.diff(position[part]) == 10).all()


def test_epochs_and_seeds_cut_elsewhere_and_repeat():
    def rows(seed, epoch):
        sampler = make([23, 17, 40], 8, 4, seed)[0]
        sampler.set_epoch(epoch)
        return tuple(tuple(draw.rows) for draw in drawn(sampler))

    assert len({rows(seed, epoch) for seed in (1, 2) for epoch in (0, 1)}) == 4
    assert rows(2, 1) == rows(2, 1)
    starts = {sampler_start for epoch in range(30) for sampler_start in [min(min(b) for b in rows(1, epoch))]}
    assert len(starts) > 1, "no epoch begins elsewhere in a document"


def test_a_place_that_is_taken_is_left_out_and_said(caplog):
    position = torch.tensor([0, 1, 1, 2, 3, 4])
    with caplog.at_level(logging.WARNING, "tercet"):
        sampler = WindowBatchSampler(Ids(torch.zeros(6, dtype=torch.long), position), 5, 1, 5)
    assert "1 of 6 rows have the position of another row of their document (the first: position 1)" in caplog.text
    assert drawn(sampler)[0].rows == [0, 1, 3, 4, 5]


def test_short_documents_and_nameless_rows_are_counted(caplog):
    label = torch.tensor([0] * 6 + [1] + [2] * 3 + [-1] * 2)
    position = torch.tensor([*range(6), 0, *range(3), 0, 1])
    with caplog.at_level(logging.WARNING, "tercet"):
        sampler = WindowBatchSampler(Ids(label, position), 6, 1, 6)
    assert "2 of 3 documents (4 sentences) are shorter than a window of 6" in caplog.text
    assert "2 of 12 rows have no document or no position" in caplog.text
    assert drawn(sampler)[0].rows == [*range(6)]


def test_rows_out_of_order_are_said(caplog):
    with caplog.at_level(logging.WARNING, "tercet"):
        make([9, 9], 3, 3, shuffled=True)
    assert "not stored in order" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([9], 9, 1), "window=1: 2 sentences or more"),
        (([9], 10, 4), "batch_size=10 is no multiple of window=4. Use batch_size=8 or 12"),
        (([3, 1], 4, 4), "the longest of 2 documents has 3 sentences"),
        (([9, 9], 20, 4), "is 5 windows of 4 sentences, but the training documents hold 4"),
    ],
)
def test_what_cannot_be_is_explained(arguments, message):
    with pytest.raises(InputError, match=message):
        make(*arguments)


def test_order_is_needed():
    none, some = torch.full((4,), -1), torch.arange(4)
    with pytest.raises(InputError, match=r"no label \(the document\)"):
        WindowBatchSampler(Ids(none, some), 2, 1, 2)
    with pytest.raises(InputError, match=r"no position"):
        WindowBatchSampler(Ids(some, none), 2, 1, 2)
