"""Peak memory of one loss and its gradient, in a process of its own.

``python -m benchmarks.peak LOSS NAME N THREADS LIMIT`` prints JSON. Linux: the kernel keeps the peak in /proc.
"""

import json
import resource
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.duels import DUELS, K, rows, step

MIB = 2**20


def peak(loss: str, name: str, n: int, threads: int, limit: float) -> float | None:
    """MiB above what the process held before the loss was called; None where ``limit`` GiB are too few."""
    command = [sys.executable, "-m", "benchmarks.peak", loss, name, str(n), str(threads), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == -9:  # the kernel's way to say it
        return None
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _status(field: str) -> int:
    """Bytes: VmRSS is held now, VmHWM was held at most, VmSize is addressed."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _measure(loss: str, name: str, n: int, limit: float) -> float | None:
    value = next(duel for duel in DUELS if duel.loss == loss).makers[name]()
    step(value, *rows(K + 8))  # what is loaded at the first call is not the loss's
    x, label = rows(n)
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + int(limit * 1024 * MIB),) * 2)
    before = _status("VmRSS")
    try:
        step(value, x, label)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        return None
    return max(0, _status("VmHWM") - before) / MIB


if __name__ == "__main__":
    loss, name, n, threads, limit = sys.argv[1:]
    torch.set_num_threads(int(threads))
    print(json.dumps(_measure(loss, name, int(n), float(limit))))
