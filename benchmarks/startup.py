"""From the command to its answer: ``python train.py --help``, and the quickstart's first step.

python -m benchmarks.startup
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from benchmarks.report import write
from benchmarks.turns import surroundings

ROOT = Path(__file__).resolve().parents[1]
GOALS = {"train.py --help": 3.0, "the quickstart's first step": 15.0, "the same, nothing measured before": 15.0}


class FirstStep(pl.Callback):
    """Ends the process when the first step is made."""

    def on_train_batch_end(self, *_: Any) -> None:
        """Not politely: nothing that follows is measured."""
        os._exit(0)


def commands(folder: str) -> dict[str, list[str]]:
    """By name; the second of the quickstart's finds its tokens in the cache, as from the second run on."""
    tick = ["+callback.tick._target_=benchmarks.startup.FirstStep", f"output_dir={folder}/run", "logger=none"]
    return {
        "train.py --help": ["--help"],
        "the quickstart's first step": tick,
        "the same, nothing measured before": [*tick, "measure_before=false"],
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="How long it takes to start.")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/startup.json"))
    options = parser.parse_args()
    rows = []
    for name, given in commands(tempfile.mkdtemp()).items():
        times = []
        for _ in range(options.repeats):
            start = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "train.py", *given], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
                capture_output=True, text=True,
            )  # fmt: skip
            times.append(time.perf_counter() - start)
            if done.returncode:
                raise SystemExit(done.stderr)
        rows.append({"name": name, "wall": statistics.median(times), "wall_spread": [min(times), max(times)],
                     "seconds_allowed": GOALS[name]})  # fmt: skip
    write(options.output, rows, json.loads(json.dumps(surroundings(os.cpu_count() or 1))))


if __name__ == "__main__":
    main()
