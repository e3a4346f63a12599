"""Training loops side by side: each makes one step when it is asked, so that a busy machine is busy for all of them."""

import platform
import statistics
import threading
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from benchmarks.device import now, since

Tick = Callable[[], None]


class Turn:
    """``start(tick)`` trains and calls ``tick`` after each step; ``step`` lets it make one, and says what it took."""

    def __init__(self, start: Callable[[Tick], Any]) -> None:
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.error: BaseException | None = None
        threading.Thread(target=self._run, args=(start,), daemon=True).start()
        self._wait()  # the first step is no measurement: it loads, allocates and compiles

    def _run(self, start: Callable[[Tick], Any]) -> None:
        try:
            start(self._tick)
            self.error = RuntimeError("the loop has come to its end")
        except BaseException as error:
            self.error = error
        self.done.release()

    def _tick(self) -> None:
        self.done.release()
        self.go.acquire()

    def _wait(self) -> None:
        self.done.acquire()
        if self.error:
            raise self.error

    def step(self) -> tuple[float, float]:
        """Seconds of wall and of CPU time."""
        start = now()
        self.go.release()
        self._wait()
        return since(start)


def by_turns(steps: Mapping[str, Callable[[], tuple[float, float]]], count: int) -> dict[str, dict[str, Any]]:
    """``count`` steps of each, one after the other; medians, and the least and the most."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    names = list(steps)
    for i in range(count):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            found[name].append(steps[name]())
    return {name: summary(taken) for name, taken in found.items()}


def summary(taken: list[tuple[float, float]]) -> dict[str, Any]:
    """Of ``(wall, cpu)`` seconds."""
    return {
        key: value
        for place, name in enumerate(("wall", "cpu"))
        for times in [[pair[place] for pair in taken]]
        for key, value in ((name, statistics.median(times)), (f"{name}_spread", [min(times), max(times)]))
    }


def surroundings(threads: int) -> dict[str, Any]:
    """What a number depends on besides the code."""
    names = ("tercet", "torch", "pytorch-lightning", "transformers", "sentence-transformers", "accelerate")
    return {
        "threads": threads,
        "platform": f"{platform.platform()}, {platform.machine()}, Python {platform.python_version()}",
        "versions": {name: found for name in names if (found := _version(name))},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
