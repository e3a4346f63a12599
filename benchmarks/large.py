"""A step of a batch beyond memory, beside CachedMultipleNegativesRankingLoss: time, and peak memory.

    python -m benchmarks.large                       a batch of 1,024: about five minutes
    python -m benchmarks.large --batches 1024 4096
    python -m benchmarks.large --device cuda --shape bert_base --batches 4096 --chunk 32768

all-MiniLM-L6-v2's shape, CLS pooling, 32 tokens at most. Each in a process of its own, one after the other: its second
step, and the most memory that it held above its libraries (weights, gradient and optimizer included).
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks import device
from benchmarks.memory import MIB, alone
from benchmarks.report import write
from benchmarks.shapes import SHAPES, Task
from benchmarks.texts import sentences, source
from benchmarks.trainers import ours, sentence_transformers
from benchmarks.turns import Turn, surroundings

RECOMPUTE = "model.execution.recompute=true"
CONTENDERS: dict[str, Any] = {
    "tercet, recomputed": lambda task, tokens: ours(task, RECOMPUTE, f"model.execution.chunk_tokens={tokens}"),
    "tercet, recomputed, smaller chunks": lambda task, tokens: ours(
        task, RECOMPUTE, f"model.execution.chunk_tokens={tokens // 2}"
    ),
    "sentence-transformers, cached, 32 rows": lambda task, _: sentence_transformers(task, 32),
    "sentence-transformers, cached, 128 rows": lambda task, _: sentence_transformers(task, 128),
    "sentence-transformers, cached, 512 rows": lambda task, _: sentence_transformers(task, 512),
    "tercet, kept": lambda task, _: ours(task, "model.execution.chunk_tokens=null"),
    "sentence-transformers, kept": lambda task, _: sentence_transformers(task),
}
KEPT = 1024  # the largest batch whose activations fit


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="A step of a large batch.")
    device.add(parser)
    parser.add_argument("--shape", choices=SHAPES, default="minilm")
    parser.add_argument("--chunk", type=int, default=1024, help="tokens that we keep the activations of")
    parser.add_argument("--batches", type=int, nargs="+", default=[1024])
    parser.add_argument("--names", nargs="+", default=list(CONTENDERS)[:3], choices=CONTENDERS)
    parser.add_argument("--alone", action="store_true", help="one, in this process")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/large.json"))
    return parser.parse_args()


def measured(options: argparse.Namespace) -> dict[str, float]:
    """Seconds of the second step, and MiB; in bf16 on CUDA."""
    batch, where = options.batches[0], options.device
    task = Task([sentences(2 * batch)], batch, options.shape, where, half=where == "cuda")
    before = device.held(where)
    turn = Turn(CONTENDERS[options.names[0]](task, options.chunk))
    wall, cpu = turn.step()
    return {"wall": wall, "cpu": cpu, "mib": (device.held(where, most=True) - before) / MIB}


def main() -> None:
    """Measure, print, write."""
    options = arguments()
    device.prepare(options)
    if options.alone:
        print("\n" + json.dumps(measured(options)))
        return
    rows: list[dict[str, Any]] = []
    for batch in options.batches:
        first = None
        for name in options.names:
            if batch > KEPT and name.endswith("kept"):
                continue
            print(f"{batch} rows, {name}", flush=True)
            given = [f"--{key}={getattr(options, key)}" for key in ("threads", "device", "shape", "chunk")]
            found = alone("benchmarks.large", "--alone", "--names", name, "--batches", batch, *given)
            first = first or found
            clock = device.clock(options.device)
            rows.append({"batch": batch, "name": name, **found, "of_their_time": first[clock] / found[clock],
                         "of_their_memory": first["mib"] / found["mib"]})  # fmt: skip
    setting = {"shape": options.shape, "texts": source(), "device": device.name(options.device)}
    write(options.output, rows, {**setting, **surroundings(options.threads)})


if __name__ == "__main__":
    main()
