"""``chunk_tokens="auto"``: the activations of a chunk fit into free memory, and the gradient is unchanged."""

import re
import weakref

import pytest
import torch

from tercet.app.components import build
from tercet.errors import InputError
from tercet.models import Execution
from tercet.models.engine import chunking
from tests.conftest import TEXTS, composed, tiny
from tests.laws.device_operations import do_as_on_a_gpu

AUTO = ["model.execution.chunk_tokens=auto", "model.execution.recompute=true"]


def encoder_of(*overrides):
    torch.manual_seed(0)
    return build(composed(*tiny(*overrides)).model)


@pytest.mark.parametrize("layout", ["packed", "sorted"])
@pytest.mark.parametrize("room", [300_000, 600_000])
def test_a_chunk_keeps_no_more_than_there_is_room_for(layout, room, monkeypatch):
    encoder = encoder_of(*AUTO, f"model.execution.layout={layout}")
    weights = sum(p.numel() * p.element_size() for p in encoder.parameters())
    monkeypatch.setattr(chunking, "free_memory", lambda device: chunking.STATES * weights + room)
    rows = encoder.prepare([f"{text} {i}" for i, text in enumerate(TEXTS * 8)])
    encoder(rows)
    assert encoder.execution.chunk_tokens == "auto", "a forward pass never changes the settings"
    plan = encoder.execution_for(rows)
    chunks = plan.chunks(rows.lengths)
    kept = [
        chunking.saved_activation_bytes(encoder, lambda some: encoder.run(some, plan.unchunked()), rows.select(chunk))
        for chunk in chunks
    ]
    assert len(chunks) > 1
    assert max(kept) < 1.2 * chunking.SHARE * room
    assert max(kept) > 0.5 * chunking.SHARE * room, "more would have fitted"


def test_a_chunk_is_half_as_large_where_graphs_keep_its_memory(monkeypatch):
    """Others run without a graph beside it."""
    do_as_on_a_gpu(monkeypatch)
    sizes = []
    for graphs in (True, False):
        encoder = encoder_of(*AUTO, f"model.execution.graphs={graphs}")
        weights = sum(p.numel() * p.element_size() for p in encoder.parameters())
        monkeypatch.setattr(chunking, "free_memory", lambda device, used=chunking.STATES * weights: used + 600_000)
        sizes.append(encoder.execution_for(encoder.prepare(TEXTS)).chunk_tokens)
    assert abs(2 * sizes[0] - sizes[1]) <= 1


def test_it_changes_no_gradient_and_no_draw(monkeypatch):
    found = []
    for overrides in ([], AUTO):
        encoder = encoder_of(*overrides, "model.execution.dropout=torch", "model.execution.layout=padded")
        monkeypatch.setattr(chunking, "free_memory", lambda device: 10**12)  # one chunk: torch's draws are the same
        torch.manual_seed(1)
        encoder(encoder.prepare(TEXTS)).square().sum().backward()
        found.append({name: p.grad for name, p in encoder.named_parameters() if p.grad is not None})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


def test_a_row_that_is_too_long_runs_alone(monkeypatch):
    encoder = encoder_of(*AUTO)
    monkeypatch.setattr(chunking, "free_memory", lambda device: 0)
    rows = encoder.prepare(TEXTS)
    encoder(rows)
    assert encoder.execution_for(rows).chunk_tokens == rows.lengths.max()


def test_out_of_memory_says_how_much_fits(monkeypatch):
    encoder = encoder_of()
    weights = sum(p.numel() * p.element_size() for p in encoder.parameters())
    monkeypatch.setattr(chunking, "free_memory", lambda device: chunking.STATES * weights + 400_000)
    rows, run, held = encoder.prepare(TEXTS * 8), encoder.run, []

    def run_in_little_memory(inputs, execution):
        if len(inputs.ids) > 60:
            activations = torch.zeros(1)
            held.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        assert not held or held[0]() is None, "the measurement began before the memory was free"
        return run(inputs, execution)

    monkeypatch.setattr(encoder, "run", run_in_little_memory)
    monkeypatch.setattr(chunking, "SAMPLE", 60)
    with pytest.raises(InputError, match=f"a pass over {len(rows.ids)} tokens does not fit") as caught:
        encoder(rows)
    fitting = int(re.search(r"execution.chunk_tokens=(\d+) and execution.recompute=true", str(caught.value))[1])
    assert 0 < fitting < len(rows.ids)
    with torch.no_grad(), pytest.raises(torch.OutOfMemoryError):  # nothing is kept there: chunks are chosen otherwise
        encoder(rows)


@pytest.mark.parametrize("gpu", [False, True])
def test_without_recomputation_it_is_the_cache_of_a_cpu_and_no_limit_on_a_gpu(gpu, monkeypatch):
    """So that the models which are small enough for a CPU are replayed as CUDA graphs on a GPU."""
    encoder = build(composed(*tiny()).model)
    rows = encoder.prepare(TEXTS)
    monkeypatch.setattr(chunking, "free_memory", lambda device: pytest.fail("measured"))
    if gpu:
        do_as_on_a_gpu(monkeypatch)
    assert encoder.execution.chunk_tokens == "auto"
    execution = encoder.execution_for(rows)
    assert execution.chunk_tokens == (None if gpu else 3072) and execution.can_replay == gpu


def test_free_memory_is_known():
    assert 2**26 < chunking.free_memory(torch.device("cpu")) < 2**50


@pytest.mark.parametrize("key", ["chunk_tokens", "chunk_rows"])
def test_other_words_are_refused(key):
    with pytest.raises(InputError, match=f"^{key}=many"):
        Execution(**{key: "many"})
