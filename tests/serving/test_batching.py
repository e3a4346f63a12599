"""Common batches of several clients: in order, none lost, fair, bounded."""

import threading
import time

import pytest

from tercet.errors import InputError
from tercet.serving.batching import SHARE, Batcher, QueueFullError


class Gate:
    """An encode function that waits for ``open``, and notes its batches."""

    def __init__(self):
        self.open, self.batches = threading.Event(), []

    def __call__(self, rows):
        self.batches.append(list(rows))
        assert self.open.wait(60)
        return [row * 2 for row in rows]


@pytest.fixture
def gate():
    gate = Gate()
    yield gate
    gate.open.set()


def test_requests_of_several_clients_share_a_batch_and_each_gets_its_own():
    seen = []
    batcher = Batcher(lambda rows: seen.append(len(rows)) or [row * 2 for row in rows], latency=10, batch=20)
    futures = [batcher.submit([i, i + 100]) for i in range(10)]
    assert [future.result(60) for future in futures] == [[2 * i, 2 * i + 200] for i in range(10)]
    assert seen == [20]
    batcher.close()


def test_a_text_waits_no_longer_than_the_latency():
    batcher = Batcher(lambda rows: rows, latency=0.05)
    start = time.monotonic()
    batcher.submit([1]).result(60)
    assert 0.04 <= time.monotonic() - start < 2
    batcher.close()


def test_behind_a_long_request_a_short_one_does_not_wait_for_all_of_it(gate):
    batcher = Batcher(gate, latency=0, batch=64)
    first = batcher.submit([0])
    while not gate.batches:
        time.sleep(0.001)
    long, short = batcher.submit(list(range(10 * SHARE))), batcher.submit([7])
    gate.open.set()
    assert short.result(60) == [14] and long.result(60) == [2 * i for i in range(10 * SHARE)] and first.result(60) == [0]
    assert 7 in gate.batches[1][SHARE:]
    assert all(len(batch) <= 64 for batch in gate.batches)
    batcher.close()


def test_a_full_queue_refuses_and_says_when_to_come_back(gate):
    batcher = Batcher(gate, latency=0, queue=10)
    batcher.submit([0])
    while not gate.batches:
        time.sleep(0.001)
    kept = batcher.submit(list(range(10)))
    with pytest.raises(QueueFullError) as refused:
        batcher.submit([1])
    assert refused.value.retry_after >= 1
    with pytest.raises(InputError, match="the queue holds 10"):
        batcher.submit(list(range(11)))
    gate.open.set()
    assert kept.result(60) == [2 * i for i in range(10)] and batcher.queued == 0
    batcher.close()


def test_closing_finishes_what_is_queued(gate):
    batcher = Batcher(gate, latency=10)
    futures = [batcher.submit([i]) for i in range(5)]
    closing = threading.Thread(target=batcher.close)
    closing.start()
    gate.open.set()
    assert [future.result(8) for future in futures] == [[2 * i] for i in range(5)], "without the latency"
    closing.join(60)
    assert not batcher.alive()
    with pytest.raises(QueueFullError):
        batcher.submit([1])


def test_an_error_is_that_of_its_own_request():
    def encode(rows):
        assert "bad" not in rows
        return rows

    batcher = Batcher(encode, latency=0.2)
    good, bad, other = batcher.submit(["a"]), batcher.submit(["b", "bad"]), batcher.submit(["c"] * 40)
    assert good.result(60) == ["a"] and other.result(60) == ["c"] * 40
    with pytest.raises(RuntimeError, match="encoding failed"):
        bad.result(60)
    assert batcher.queued == 0
    batcher.close()


def test_a_request_whose_client_has_gone_is_left_out(gate):
    batcher = Batcher(gate, latency=0)
    batcher.submit([0])
    while not gate.batches:
        time.sleep(0.001)
    gone, kept = batcher.submit([1, 2]), batcher.submit([3])
    assert gone.cancel()
    gate.open.set()
    assert kept.result(60) == [6] and gate.batches[1:] == [[3]] and batcher.queued == 0
    assert batcher.submit([]).result(0) == []
    batcher.close()


@pytest.mark.parametrize("wrong", [{"latency": -1}, {"batch": 0}, {"queue": 0}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        Batcher(lambda rows: rows, **wrong)
