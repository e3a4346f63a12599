"""Time and memory of a triplet loss and its gradient, beside the libraries that define the same loss.

    python -m benchmarks.mining                      needs five minutes and 6 GiB, ``--sizes 256 512`` half a minute

The peers live in an environment of their own, with this repository's torch:

    python -m venv .venv-peers && .venv-peers/bin/pip install -c constraints.txt -e .
    .venv-peers/bin/pip install pytorch-metric-learning sentence-transformers
    .venv-peers/bin/python -m benchmarks.mining

A peer that is missing is named and left out. Both of a pair run in one process by turns, so that a busy machine is
busy for both, on the same rows of 128 dimensions, 40 of a label; before that their losses and gradients are compared.
"""

import argparse
import json
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.duels import DUELS, OURS, Duel, Value, rows, step
from benchmarks.peak import peak
from benchmarks.table import growths, ratios, table

AGREE = {torch.float64: (1e-6, 1e-6), torch.float32: (1e-4, 1e-2)}  # of the loss; of the gradient, which a tie may jump


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="A triplet loss beside other libraries': time and memory.")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024, 1800, 4000], help="rows of a batch")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=float, default=12, help="GiB; what needs more does not fit")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/mining.json"))
    return parser.parse_args()


def agreement(values: dict[str, Value], n: int) -> list[dict[str, Any]]:
    """How far a peer's loss and gradient are from ours, relatively; stops where they are another loss's."""
    found = []
    for dtype, (loss_most, gradient_most) in AGREE.items():
        (loss, gradient), *others = (step(value, *rows(n, dtype)) for value in values.values())
        for their_loss, their_gradient in others:
            off = float((their_loss - loss).abs() / loss), float((their_gradient - gradient).norm() / gradient.norm())
            name = str(dtype).removeprefix("torch.")
            print(f"    {name}: loss {float(loss):.6f}, apart by {off[0]:.0e}; gradient apart by {off[1]:.0e}", flush=True)
            if off[0] > loss_most or off[1] > gradient_most:
                raise SystemExit("The two do not compute the same: nothing to compare.")
            found.append({"n": n, "dtype": name, "loss": off[0], "gradient": off[1]})
    return found


def times(values: dict[str, Value], n: int, repeats: int) -> dict[str, dict[str, Any]]:
    """Seconds of forward and backward, by turns."""
    wall: dict[str, list[float]] = {name: [] for name in values}
    cpu: dict[str, list[float]] = {name: [] for name in values}
    x, label = rows(n)
    for _ in range(repeats):
        for name, value in values.items():
            start = time.perf_counter(), time.process_time()
            step(value, x, label)
            wall[name].append(time.perf_counter() - start[0])
            cpu[name].append(time.process_time() - start[1])
    return {
        name: {
            "wall": statistics.median(wall[name]),
            "wall_spread": [min(wall[name]), max(wall[name])],
            "cpu": statistics.median(cpu[name]),
            "cpu_spread": [min(cpu[name]), max(cpu[name])],
        }
        for name in values
    }


def measured(duel: Duel, n: int, options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A row for each of the two, and their agreement."""
    print(f"{duel.loss}, N = {n}", flush=True)
    peaks = {name: peak(duel.loss, name, n, options.threads, options.limit) for name in duel.present()}
    values = {name: duel.makers[name]() for name, most in peaks.items() if most is not None}
    agreed = agreement(values, n)
    timed = times(values, n, options.repeats)
    found = [{"loss": duel.loss, "name": name, "n": n, "peak": peaks[name], **timed.get(name, {})} for name in peaks]
    return found, [{"duel": duel.loss, **one} for one in agreed]


def main() -> None:
    """Measure, print, write."""
    options = arguments()
    torch.set_num_threads(options.threads)
    for duel in DUELS:
        if duel.peer not in duel.present():
            print(f"{duel.peer} is not installed: ours alone. `python -m benchmarks.mining` in .venv-peers has both.")
    found, agreed = [], []
    for n in options.sizes:
        for duel in DUELS:
            one, same = measured(duel, n, options)
            found += one
            agreed += same
    peers = sorted({name for duel in DUELS for name in duel.present()})
    report = {
        "rows": found,
        "ratios": ratios(found),
        "growth": growths(found),
        "agreement": agreed,
        "versions": {name: version(name) for name in [*peers, "torch", "numpy"]},
        "threads": options.threads,
        "limit_gib": options.limit,
        "platform": f"{platform.platform()}, {platform.processor() or platform.machine()}, Python {platform.python_version()}",
    }
    print(table(report, OURS))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"Written to {options.output}.")


if __name__ == "__main__":
    main()
