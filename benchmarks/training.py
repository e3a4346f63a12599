"""A training step beside other libraries': unsupervised SimCSE on sentences, supervised on triplets.

    python -m benchmarks.training                    both, about five minutes
    python -m benchmarks.training --tasks unsup --steps 16
    python -m benchmarks.training --names tercet 'tercet, compiled' 'tercet, AdamW not fused'
    python -m benchmarks.training --device cuda      BERT-base's shape in bf16, batches of 64 and 512

all-MiniLM-L6-v2's shape, batch 64, 32 tokens at most, dropout 0.1. Every step is made by everybody in turn; a ratio is
that of the medians of CPU time against the first, on CUDA of wall time. TFLOP/s are those of real tokens, the same work
for everybody. In bf16 too where the CPU has it. `make benchmark` has the environment.
"""

import argparse
from pathlib import Path
from typing import Any

from benchmarks import device
from benchmarks.report import write
from benchmarks.shapes import SHAPES, Task, step_flops
from benchmarks.texts import sentences, source
from benchmarks.trainers import ALL, contenders
from benchmarks.turns import Turn, by_turns, surroundings

GOALS = {
    "cpu": {"sentence-transformers": 2.5, "bare loop, padded": 2.2, "tercet, encoder alone": 0.95},
    "cuda": {"sentence-transformers": 2.0, "sentence-transformers, flash": 1.2, "tercet, encoder alone": 0.95},
}
BATCHES = {"cpu": [64], "cuda": [64, 512]}


def arguments() -> argparse.Namespace:
    """The command line; what is not said depends on the device."""
    parser = argparse.ArgumentParser(description="A training step beside other libraries'.")
    device.add(parser)
    parser.add_argument("--tasks", nargs="+", default=["unsup", "sup"], choices=["unsup", "sup"])
    parser.add_argument("--names", nargs="+", choices=ALL)
    parser.add_argument("--shape", choices=SHAPES, help="minilm on a CPU, bert_base on CUDA")
    parser.add_argument("--batches", type=int, nargs="+", help="64 rows; 64 and 512 on CUDA")
    parser.add_argument("--steps", type=int, default=8, help="of each, as many different batches")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/training.json"))
    options = parser.parse_args()
    options.shape = options.shape or ("bert_base" if options.device == "cuda" else "minilm")
    options.names = options.names or contenders(options.device)
    options.batches = options.batches or BATCHES[options.device]
    return options


def texts(task: str, count: int) -> list[list[str]]:
    """``count`` rows: of sentences, or of three."""
    if task == "unsup":
        return [sentences(count)]
    drawn = sentences(3 * count)
    return [drawn[:count], drawn[count : 2 * count], drawn[2 * count :]]


def measured(kind: str, task: Task, names: list[str], steps: int) -> list[dict[str, Any]]:
    """A row for each contender."""
    turns = {}
    for name in names:
        print(f"{kind}, {task.batch} rows: {name} makes its first step", flush=True)
        turns[name] = Turn(ALL[name](task))
    found = by_turns({name: turn.step for name, turn in turns.items()}, steps)
    clock = device.clock(task.device)
    mine, work = found[names[0]][clock], step_flops(task) / 1e12
    return [
        {"task": kind, "batch": task.batch, "name": name, "rows_per_second": task.batch / row["wall"],
         "ratio": row[clock] / mine, "goal": GOALS[task.device].get(name), **_speed(kind, task, work, row["wall"]), **row}
        for name, row in found.items()
    ]  # fmt: skip


def _speed(kind: str, task: Task, work: float, seconds: float) -> dict[str, float]:
    """On CUDA what a million sentences take, too, and the share of what the chip can do."""
    found = {"tflops": work / seconds}
    if task.device == "cuda":
        if most := device.peak(task.device):
            found["share_of_peak"] = found["tflops"] / most
        if kind == "unsup":
            found["minutes_a_million"] = 1e6 / task.batch * seconds / 60
    return found


def main() -> None:
    """Measure, print, write."""
    options = arguments()
    device.prepare(options)
    rows = []
    for batch in options.batches:
        for kind in options.tasks:
            columns = texts(kind, batch * options.steps)
            task = Task(columns, batch, options.shape, options.device, half=options.device == "cuda")
            rows += measured(kind, task, options.names, options.steps)
    setting = {"shape": options.shape, "steps": options.steps, "texts": source(), "device": device.name(options.device)}
    write(options.output, rows, {**setting, **surroundings(options.threads)})


if __name__ == "__main__":
    main()
