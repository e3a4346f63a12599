"""Freed memory is returned to the system, and not more often than it pays."""

import pytest
import torch

from tercet.models import Execution
from tercet.models.engine import chunking
from tests.conftest import TEXTS
from tests.models.test_autochunk import encoder_of

pytestmark = pytest.mark.skipif(chunking._trim is None, reason="malloc is not glibc's")


def holes(megabytes):
    """Memory that malloc cannot give back by itself: what is above it is in use."""
    blocks = [torch.ones(4096) for _ in range(megabytes * 64)]
    return blocks[-1]


def test_what_is_free_is_given_back():
    top = holes(200)
    before = chunking.resident_bytes()
    chunking.trim_heap(now=True)
    assert chunking.resident_bytes() < before - 100 * 2**20
    del top


def test_it_is_given_back_only_where_the_process_has_grown(monkeypatch):
    asked = []
    monkeypatch.setattr(chunking, "_trim", asked.append)
    monkeypatch.setattr(chunking, "_trimmed_size", 0)
    sizes = iter([100, 100, 149, 151, 120, 170, 181, 90])
    monkeypatch.setattr(chunking, "resident_bytes", lambda: next(sizes))
    chunking.trim_heap()  # 100, and 100 is left
    chunking.trim_heap()  # 149
    assert len(asked) == 1
    chunking.trim_heap()  # 151, and 120 is left
    assert len(asked) == 2
    chunking.trim_heap()  # 170
    assert len(asked) == 2
    chunking.trim_heap()  # 181
    assert len(asked) == 3


def test_chunks_that_are_computed_again_ask_for_it_each_time(monkeypatch):
    asked = []
    monkeypatch.setattr(chunking, "trim_heap", lambda: asked.append(1))
    encoder = encoder_of()
    rows = encoder.prepare(TEXTS)
    plan = Execution("packed", chunk_tokens=20, recompute=True)
    chunks = len(plan.chunks(rows.lengths))
    encoder.run(rows, plan).sum().backward()
    assert chunks > 1 and len(asked) == 2 * chunks
