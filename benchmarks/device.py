"""The device of a benchmark: a clock that waits for it, what it holds, what it could compute at most."""

import argparse
import os
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from benchmarks.memory import status

# TFLOP/s of dense products in bf16 with sums in float32, from NVIDIA's data sheets; the first name that fits.
PEAK = {
    "H100 PCIe": 756, "H100 NVL": 835, "H200 NVL": 835, "H100": 989, "H200": 989, "B200": 2250, "A100": 312, "L40S": 362,
    "A10": 125, "L4": 121, "RTX 4090": 165,
}  # fmt: skip


def add(parser: argparse.ArgumentParser) -> None:
    """``--device`` and ``--threads``."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")


def prepare(options: argparse.Namespace) -> None:
    """Before the first tensor: one GPU only, since a peer's trainer would take all; and the threads."""
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    torch.set_num_threads(options.threads)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: there is no CUDA device here, or this torch is built without it.")


def now() -> tuple[float, float]:
    """Seconds of wall and of CPU time, once a GPU has done what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def mark() -> "torch.cuda.Event | float":
    """A moment: when a GPU comes to it in its order of work, for which nobody waits."""
    if not torch.cuda.is_initialized():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(marks: Sequence[Any]) -> list[float]:
    """From each mark to the next."""
    if isinstance(marks[-1], float):
        return [after - before for before, after in pairwise(marks)]
    marks[-1].synchronize()
    return [before.elapsed_time(after) / 1000 for before, after in pairwise(marks)]


def since(start: tuple[float, float]) -> tuple[float, float]:
    """Seconds of wall and of CPU time from ``start = now()`` on."""
    wall, cpu = now()
    return wall - start[0], cpu - start[1]


def clock(device: str) -> str:
    """Which of the two a ratio is of: a CPU is shared with others, a GPU's work takes no CPU time."""
    return "wall" if device == "cuda" else "cpu"


def held(device: str, most: bool = False) -> int:
    """Bytes that are held now, or were at ``most``: the GPU's tensors, or this process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() if most else torch.cuda.memory_allocated()
    return status("VmHWM" if most else "VmRSS")


def name(device: str) -> str:
    """What a figure is labelled with."""
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def peak(device: str) -> float | None:
    """TFLOP/s that the data sheet promises in bf16; None where it is not known."""
    return next((float(most) for part, most in PEAK.items() if part in name(device)), None)
