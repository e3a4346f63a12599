"""Requests of many clients, encoded in common batches by one thread."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from math import ceil
from typing import Any, Generic, TypeVar

from tercet.errors import InputError, require

Row = TypeVar("Row")
Result = TypeVar("Result")

BATCH = 128  # rows; more do not raise throughput, and others wait longer
SHARE = 32  # rows of one request in a row: behind a long request a short one does not wait for all of it


class QueueFullError(Exception):
    """There is no room for the rows of a request; ``retry_after`` is in how many seconds there may be."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"The queue is full. Try again in {retry_after} s.")
        self.retry_after = retry_after


@dataclass(eq=False)
class _Request(Generic[Row, Result]):
    rows: Sequence[Row]
    future: "Future[list[Result]]" = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)
    taken: int = 0
    results: list[Result] = field(default_factory=list)


class Batcher(Generic[Row, Result]):
    """Encode the rows of all requests in batches, in a thread of its own; ``encode`` gives one result for each row.

    A batch begins when ``batch`` rows wait, or when the oldest request has waited for ``latency`` seconds. Requests of more
    than ``SHARE`` rows take turns. At most ``queue`` rows wait. An error of a batch is that of the request it comes from:
    the requests are tried one by one. ``observe(rows, seconds)`` is called after each batch, ``waiting(change)`` when the
    number of rows that wait changes.

    >>> batcher = Batcher(lambda rows: [row.upper() for row in rows], latency=0.01)
    >>> batcher.submit(["a", "b"]).result()
    ['A', 'B']
    >>> batcher.close()
    """

    def __init__(
        self, encode: Callable[[list[Row]], Sequence[Result]], latency: float = 0.005, batch: int = BATCH, queue: int = 8192,
        observe: Callable[[int, float], Any] = lambda rows, seconds: None, waiting: Callable[[int], Any] = lambda change: None,
    ) -> None:  # fmt: skip
        require(0 <= latency <= 10, f"`latency`={latency}: seconds from 0 to 10 are needed.")
        require(batch >= 1 and queue >= 1, f"`batch`={batch}, `queue`={queue}: rows, 1 or more of each, are needed.")
        self.encode, self.latency, self.batch, self.queue = encode, latency, batch, queue
        self.observe, self.waiting = observe, waiting
        self.queued = 0
        self._row_seconds = 0.005  # of one row, a moving average
        self._requests: deque[_Request[Row, Result]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    def submit(self, rows: Sequence[Row]) -> "Future[list[Result]]":
        """The results of all rows, in order; raises ``QueueFullError`` where they do not fit into the queue."""
        require(len(rows) <= self.queue, f"A request has {len(rows)} rows, but the queue holds {self.queue}.")
        request: _Request[Row, Result] = _Request(rows)
        with self._changed:
            if self._closed or self.queued + len(rows) > self.queue:
                raise QueueFullError(max(1, ceil(self.queued * self._row_seconds)))
            if not rows:
                request.future.set_result([])
                return request.future
            self._count(len(rows))
            self._requests.append(request)
            self._changed.notify()
        return request.future

    def alive(self) -> bool:
        """Whether rows are accepted."""
        return self._thread.is_alive() and not self._closed

    def close(self) -> None:
        """Accept nothing more, encode what is queued, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _count(self, change: int) -> None:
        self.queued += change
        self.waiting(change)

    def _work(self) -> None:
        while batch := self._next_batch():
            self._encode(batch)

    def _next_batch(self) -> list[tuple[_Request[Row, Result], Sequence[Row]]]:
        """Parts of requests, as soon as it is time; nothing when the batcher is closed and the queue is empty."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._requests or self._closed)
                if not self._requests:
                    return []
                due = min(request.arrived for request in self._requests) + self.latency
                self._changed.wait_for(lambda: self._closed or self.queued >= self.batch, max(0.0, due - time.monotonic()))
                if parts := self._take():
                    return parts

    def _take(self) -> list[tuple[_Request[Row, Result], Sequence[Row]]]:
        parts, room = [], self.batch
        while room and self._requests:
            request = self._requests.popleft()
            if not request.taken and not request.future.set_running_or_notify_cancel():  # its client has gone
                self._count(-len(request.rows))
                continue
            rows = request.rows[request.taken : request.taken + min(room, SHARE)]
            request.taken += len(rows)
            room -= len(rows)
            parts.append((request, rows))
            self._count(-len(rows))
            if request.taken < len(request.rows):
                self._requests.append(request)
        return parts

    def _encode(self, parts: list[tuple[_Request[Row, Result], Sequence[Row]]]) -> None:
        rows, start = [row for _, part in parts for row in part], time.monotonic()
        try:
            results = list(self.encode(rows))
        except Exception as error:
            if len(parts) > 1:
                for one in parts:
                    self._encode([one])
            else:
                self._fail(parts[0][0], error)
            return
        seconds = time.monotonic() - start
        self._row_seconds += 0.2 * (seconds / len(rows) - self._row_seconds)
        self.observe(len(rows), seconds)
        for request, part in parts:
            request.results += results[: len(part)]
            results = results[len(part) :]
            if len(request.results) == len(request.rows) and not request.future.done():
                request.future.set_result(request.results)

    def _fail(self, request: _Request[Row, Result], error: Exception) -> None:
        """End a request by an error; the rest of its rows is left out."""
        with self._changed:
            if request in self._requests:
                self._requests.remove(request)
                self._count(request.taken - len(request.rows))
        if not request.future.done():
            known = isinstance(error, InputError)
            request.future.set_exception(error if known else RuntimeError(f"encoding failed: {error!r}"))
