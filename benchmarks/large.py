"""A step of a batch beyond memory, beside CachedMultipleNegativesRankingLoss: time, and peak memory.

    python -m benchmarks.large                       a batch of 1,024: about five minutes
    python -m benchmarks.large --batches 1024 4096

all-MiniLM-L6-v2's shape, CLS pooling, 32 tokens at most. Each in a process of its own, one after the other: its second
step, and the most memory that it held above its libraries (weights, gradient and optimizer included).
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory import MIB, alone, status
from benchmarks.report import write
from benchmarks.texts import sentences, source
from benchmarks.trainers import ours, sentence_transformers
from benchmarks.turns import Turn, surroundings

CHUNKS = ("model.execution.recompute=true", "model.execution.chunk_tokens=1024")
CONTENDERS: dict[str, Any] = {
    "tercet, recomputed": lambda columns, batch: ours(columns, batch, *CHUNKS),
    "tercet, recomputed, smaller chunks": lambda columns, batch: ours(
        columns, batch, CHUNKS[0], f"{CHUNKS[1][:-4]}512"
    ),
    "sentence-transformers, cached, 32 rows": lambda columns, batch: sentence_transformers(columns, batch, 32),
    "sentence-transformers, cached, 128 rows": lambda columns, batch: sentence_transformers(columns, batch, 128),
    "tercet, kept": ours,
    "sentence-transformers, kept": sentence_transformers,
}
KEPT = 1024  # the largest batch whose activations fit


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="A step of a large batch.")
    parser.add_argument("--batches", type=int, nargs="+", default=[1024])
    parser.add_argument("--names", nargs="+", default=list(CONTENDERS)[:3], choices=CONTENDERS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--alone", action="store_true", help="one, in this process")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/large.json"))
    return parser.parse_args()


def measured(name: str, batch: int) -> dict[str, float]:
    """Seconds of the second step, and MiB."""
    texts = sentences(2 * batch)
    before = status("VmRSS")
    turn = Turn(CONTENDERS[name]([texts], batch))
    wall, cpu = turn.step()
    return {"wall": wall, "cpu": cpu, "mib": (status("VmHWM") - before) / MIB}


def main() -> None:
    """Measure, print, write."""
    options = arguments()
    torch.set_num_threads(options.threads)
    if options.alone:
        print("\n" + json.dumps(measured(options.names[0], options.batches[0])))
        return
    rows: list[dict[str, Any]] = []
    for batch in options.batches:
        ours = None
        for name in options.names:
            if batch > KEPT and name.endswith("kept"):
                continue
            print(f"{batch} rows, {name}", flush=True)
            given = ["--alone", "--names", name, "--batches", batch, "--threads", options.threads]
            found = alone("benchmarks.large", *given)
            ours = ours or found
            rows.append({"batch": batch, "name": name, **found, "of_their_time": ours["cpu"] / found["cpu"],
                         "of_their_memory": ours["mib"] / found["mib"]})  # fmt: skip
    write(options.output, rows, {"texts": source(), **surroundings(options.threads)})


if __name__ == "__main__":
    main()
