"""NoDuplicatesBatchSampler: no text twice in a batch, the same batches for any number of processes and after resuming."""

from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tercet.data import NoDuplicatesBatchSampler, TextFiles, TextTransform
from tercet.data import samplers as batches_module
from tercet.data.samplers import ResumableSampler
from tercet.errors import InputError
from tercet.models import load_tokenizer
from tests.conftest import TOKENIZER, Ids


def drawn(sampler, rank=0, world=1, epoch=0):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches_module, "rank", lambda: rank)
        patch.setattr(batches_module, "world_size", lambda: world)
        sampler.set_epoch(epoch)
        return list(sampler)


def make(pairs, batch_size, seed=1):
    return NoDuplicatesBatchSampler(SimpleNamespace(content_hash=torch.tensor(pairs).T), batch_size, seed)


@settings(max_examples=60)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 9), st.integers(10, 29)), min_size=6, max_size=60),
    world=st.integers(1, 4), seed=st.integers(0, 9), epoch=st.integers(0, 3),
)  # fmt: skip
def test_no_text_is_twice_in_a_batch_of_any_number_of_processes(pairs, world, seed, epoch):
    size = min(len({q for q, _ in pairs}), len({a for _, a in pairs}))
    if size < 2:
        return
    sampler = make(pairs, size // 2 + 1, seed)
    alone = drawn(sampler, epoch=epoch)
    parts = list(zip(*(drawn(sampler, r, world, epoch) for r in range(world)), strict=True))
    assert [list(chain(*(p.rows for p in step))) for step in parts] == [draw.rows for draw in alone]
    assert len(alone) == len(sampler) == len(pairs) // sampler.batch_size
    for draw in alone:
        texts = [text for row in draw.rows for text in pairs[row]]
        assert len(set(texts)) == 2 * len(draw.rows)
        left = [pair for pair in pairs if not set(pair) & set(texts)]
        assert len(draw.rows) == sampler.batch_size or not left, "a short batch has room for no other row"


def test_rows_without_repeats_come_once_an_epoch_and_others_at_the_next_chance():
    distinct = make([(i, 100 + i) for i in range(20)], 5)
    assert sorted(chain(*(draw.rows for draw in drawn(distinct)))) == list(range(20))
    # Ten answers to one question and 30 other pairs: each of the ten comes once, in a batch of its own.
    several = make([(0, 100 + i) for i in range(10)] + [(1 + i, 200 + i) for i in range(30)], 4)
    batches = [draw.rows for draw in drawn(several)]
    assert [sum(row < 10 for row in rows) for rows in batches] == [1] * 10
    assert sorted(row for rows in batches for row in rows if row < 10) == list(range(10))


def test_epochs_and_seeds_differ_and_a_resumed_epoch_goes_on():
    pairs = [(i // 2, 100 + i) for i in range(40)]
    orders = {str(drawn(make(pairs, 6, seed), epoch=epoch)) for seed in (1, 2) for epoch in (0, 1)}
    assert len(orders) == 4
    sampler = make(pairs, 6)
    assert [indices._replace(step=0) for indices in ResumableSampler(sampler, lambda: (4, 4, 1))] == drawn(sampler)[4:]


def test_several_answers_of_a_file(tmp_path):
    """Equality is that of the contents that the loss compares."""
    file = tmp_path / "answers.csv"
    lines = [f"Which number is it?,It is number {i}." for i in range(9)] + [f"Who is person {i}?,It is {i}." for i in range(9)]
    file.write_text("\n".join(["question,answer", *lines, "Who is he?,It is 3."]))
    rows = TextTransform(load_tokenizer(TOKENIZER), cache=str(tmp_path)).load(TextFiles(str(file), ["question", "answer"]))
    batches = drawn(NoDuplicatesBatchSampler(rows, 6, seed=1))
    assert len(batches) == 3
    for draw in batches:
        content = rows[draw].content_hash
        assert len(content.unique()) == 12 and sum(row < 9 for row in draw.rows) == 1


def test_what_cannot_be_drawn_is_said(caplog):
    with pytest.raises(InputError, match=r"batch_size=3, but a column has only 2 different texts. Use batch_size=2"):
        make([(0, 10), (0, 11), (1, 12)], 3)
    with pytest.raises(InputError, match="these rows are images"):
        NoDuplicatesBatchSampler(Ids(torch.zeros(4)), 2, 0)
    # Both questions have the same two answers but one: (0, 10) leaves no room but for (1, 11).
    short = make([(0, 10), (1, 10), (1, 10), (1, 11), (1, 11)], 2)
    assert {len(draw.rows) for epoch in range(9) for draw in drawn(short, epoch=epoch)} == {1, 2}
    assert "each other row shares a text" in caplog.text
