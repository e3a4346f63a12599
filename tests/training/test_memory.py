"""The cross-batch memory: which rows it holds, in any order of batches; a GPU is not read for it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tercet.training import Memory
from tercet.types import Embeddings
from tests.laws.device_operations import DeviceOperations


def batch(ids, step, bad=False):
    """Rows whose vectors say of which step they are."""
    ids = torch.tensor(ids)
    z = torch.full((2, len(ids), 3), float("nan") if bad else float(step)).requires_grad_()
    return Embeddings(z, ids, ids % 3, ids, torch.stack([ids, ids + 100]))


def rows(e):
    return [(int(i), float(z)) for i, z in zip(e.example_id, e.z[0, :, 0], strict=True)]


BATCHES = st.lists(st.tuples(st.sets(st.integers(0, 9), min_size=1, max_size=4), st.booleans()), max_size=8)


@given(batches=BATCHES, size=st.integers(1, 7), warmup=st.integers(0, 2), saved_after=st.integers(0, 8))
def test_it_holds_the_newest_examples_once(batches, size, warmup, saved_after):
    """Of other examples than the batch's, none of a batch that is not finite; the same after a checkpoint."""
    memory, held, steps = Memory(size, warmup), [], 0
    for step, (ids, bad) in enumerate(batches):
        keys = batch(sorted(ids), step, bad)
        extended = memory.extend_and_push(keys, keys.example_id)
        others = [(i, z) for i, z in held if i not in ids]
        assert rows(extended)[len(keys) :] == (others if steps >= warmup else [])
        assert extended.z.requires_grad and not memory.stored.z.requires_grad
        if not bad:
            held, steps = [*others, *((i, float(step)) for i in sorted(ids))][-size:], steps + 1
        if step == saved_after:
            state, memory = memory.get_extra_state(), Memory(size, warmup)
            memory.set_extra_state(state)
    memory.settle()
    assert rows(memory.stored) == held if held else memory.stored is None
    assert memory.steps == steps


def test_it_asks_nothing_of_the_device():
    memory = Memory(size=5, warmup=0)
    for step in range(3):
        keys = batch([step, step + 1, step + 2], step)
        ids = keys.example_id.clone()
        with DeviceOperations() as operations:
            memory.extend_and_push(keys, ids)
        assert operations.total <= 25, operations.counts


@pytest.mark.gpu
def test_rows_on_a_gpu_that_are_not_finite_are_not_kept():
    memory = Memory(size=5, warmup=0)
    for step, bad in enumerate((False, True, False)):
        keys = batch([3 * step, 3 * step + 1], step, bad)
        on_gpu = Embeddings(**{name: x.cuda() for name, x in vars(keys).items()})
        memory.extend_and_push(on_gpu, keys.example_id)
    memory.settle()
    assert rows(memory.stored) == [(0, 0.0), (1, 0.0), (6, 2.0), (7, 2.0)]
