"""A training step beside other libraries': unsupervised SimCSE on sentences, supervised on triplets.

    python -m benchmarks.training                    both, about five minutes
    python -m benchmarks.training --tasks unsup --steps 16
    python -m benchmarks.training --names tercet 'tercet, compiled'

all-MiniLM-L6-v2's shape, batch 64, 32 tokens at most, dropout 0.1. Every step is made by everybody in turn; a ratio is
that of the medians of CPU time against the first. In bf16 too where the CPU has it. `make benchmark` has the environment.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import write
from benchmarks.texts import sentences, source
from benchmarks.trainers import COMPILED, CONTENDERS
from benchmarks.turns import Turn, by_turns, surroundings

GOALS = {"sentence-transformers": 2.5, "bare loop, padded": 2.2, "tercet, encoder alone": 0.95}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="A training step beside other libraries'.")
    parser.add_argument("--tasks", nargs="+", default=["unsup", "sup"], choices=["unsup", "sup"])
    parser.add_argument("--names", nargs="+", default=[n for n in CONTENDERS if n not in COMPILED], choices=CONTENDERS)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=8, help="of each, as many different batches")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/training.json"))
    return parser.parse_args()


def measured(task: str, names: list[str], batch: int, steps: int) -> list[dict[str, Any]]:
    """A row for each contender."""
    count = batch * steps
    texts = sentences(count * (1 if task == "unsup" else 3))
    columns = [texts] if task == "unsup" else [texts[:count], texts[count : 2 * count], texts[2 * count :]]
    turns = {}
    for name in names:
        print(f"{task}: {name} makes its first step", flush=True)
        turns[name] = Turn(CONTENDERS[name](columns, batch))
    found = by_turns({name: turn.step for name, turn in turns.items()}, steps)
    mine = found[names[0]]["cpu"]
    return [
        {"task": task, "name": name, "rows_per_second": batch / row["wall"], "ratio": row["cpu"] / mine,
         "goal": GOALS.get(name), **row}
        for name, row in found.items()
    ]  # fmt: skip


def main() -> None:
    """Measure, print, write."""
    options = arguments()
    torch.set_num_threads(options.threads)
    rows = [row for task in options.tasks for row in measured(task, options.names, options.batch, options.steps)]
    setting = {"batch": options.batch, "steps": options.steps, "texts": source(), **surroundings(options.threads)}
    write(options.output, rows, setting)


if __name__ == "__main__":
    main()
