"""Peak memory of one loss and its gradient, in a process of its own.

``python -m benchmarks.peak LOSS NAME N THREADS LIMIT`` prints JSON. Linux: the kernel keeps the peak in /proc.
"""

import json
import resource
import sys

import torch

from benchmarks.duels import DUELS, K, rows, step
from benchmarks.memory import MIB, alone, status


def peak(loss: str, name: str, n: int, threads: int, limit: float) -> float | None:
    """MiB above what the process held before the loss was called; None where ``limit`` GiB are too few."""
    return alone("benchmarks.peak", loss, name, n, threads, limit)


def _measure(loss: str, name: str, n: int, limit: float) -> float | None:
    value = next(duel for duel in DUELS if duel.loss == loss).makers[name]()
    step(value, *rows(K + 8))  # what is loaded at the first call is not the loss's
    x, label = rows(n)
    resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + int(limit * 1024 * MIB),) * 2)
    before = status("VmRSS")
    try:
        step(value, x, label)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        return None
    return max(0, status("VmHWM") - before) / MIB


if __name__ == "__main__":
    loss, name, n, threads, limit = sys.argv[1:]
    torch.set_num_threads(int(threads))
    print(json.dumps(_measure(loss, name, int(n), float(limit))))
