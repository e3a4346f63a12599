"""What was freed is given back, and not more often than it pays."""

import pytest
import torch

from tercet.model import Execution, execution, heap
from tests.conftest import TEXTS
from tests.model.test_fitting import encoder_of

pytestmark = pytest.mark.skipif(heap._trim is None, reason="malloc is not glibc's")


def holes(megabytes):
    """Memory that malloc cannot give back by itself: what is above it is in use."""
    blocks = [torch.ones(4096) for _ in range(megabytes * 64)]
    return blocks[-1]


def test_what_is_free_is_given_back():
    top = holes(200)
    before = heap.held()
    heap.tidy(now=True)
    assert heap.held() < before - 100 * 2**20
    del top


def test_it_is_given_back_only_where_the_process_has_grown(monkeypatch):
    asked = []
    monkeypatch.setattr(heap, "_trim", asked.append)
    monkeypatch.setattr(heap, "_left", 0)
    sizes = iter([100, 100, 149, 151, 120, 170, 181, 90])
    monkeypatch.setattr(heap, "held", lambda: next(sizes))
    heap.tidy()  # 100, and 100 is left
    heap.tidy()  # 149
    assert len(asked) == 1
    heap.tidy()  # 151, and 120 is left
    assert len(asked) == 2
    heap.tidy()  # 170
    assert len(asked) == 2
    heap.tidy()  # 181
    assert len(asked) == 3


def test_chunks_that_are_computed_again_ask_for_it_each_time(monkeypatch):
    asked = []
    monkeypatch.setattr(execution, "tidy", lambda: asked.append(1))
    encoder = encoder_of()
    rows = encoder.inputs(TEXTS)
    plan = Execution("packed", "auto", 20, None, True)
    chunks = plan.passes(rows)
    encoder.run(rows, plan).sum().backward()
    assert chunks > 1 and len(asked) == 2 * chunks
