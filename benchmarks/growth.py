"""How time and memory grow: the loss and a whole step with N, encoding with the length of a row.

    python -m benchmarks.growth                              three minutes on one thread
    python -m benchmarks.growth --kinds loss step --sizes 65536 --threads 2      the batch of 65,536 pairs

Each in a process of its own. ``loss``: InfoNCE and its gradient for N pairs of 256 columns. ``step``: a training step of
N pairs through two layers of 128 columns and a head of 256, recomputed, AdamW. ``length``: forward and backward of 4,096
tokens of MiniLM's shape in rows of L tokens.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import composed
from benchmarks.memory import MIB, alone, status
from benchmarks.report import exponent, write
from benchmarks.shapes import MODEL, Task
from benchmarks.trainers import overrides
from benchmarks.turns import surroundings
from tercet.app.components import build
from tercet.models import Encoder
from tercet.types import Batch, Embeddings, TokenBatch

D = 256
TOKENS = 4096
SIZES = {"loss": (1024, 2048, 4096, 8192, 16384), "step": (512, 1024, 2048, 4096), "length": (16, 64, 128, 256, 512)}
TWO_LAYERS = (
    "model=bert_small", f"model.tokenizer.name={MODEL}", "model.backbone.config.hidden_size=128",
    "model.backbone.config.num_hidden_layers=2", "model.backbone.config.num_attention_heads=2",
    "model.backbone.config.intermediate_size=512", "model.head.kind=linear", f"model.head.dim={D}",
    "model.execution.recompute=true", "model.execution.chunk_tokens=4096",
)  # fmt: skip
Work = Callable[[], Any]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Time and memory against size.")
    parser.add_argument("--kinds", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--sizes", type=int, nargs="+", help="in place of each kind's own")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--alone", action="store_true", help="one, in this process")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/growth.json"))
    return parser.parse_args()


def loss(n: int) -> Work:
    """InfoNCE as ``loss=infonce`` has it, both views with a gradient."""
    criterion, z, ids = (build(composed.configuration([]).loss), torch.randn(2, n, D, requires_grad=True), torch.arange(n))

    def work() -> None:
        rows = Embeddings(z, ids, torch.full_like(ids, -1), ids, torch.arange(2 * n).view(2, n))
        criterion(rows, rows).loss_sum.backward()

    return work


def step(n: int) -> Work:
    """Forward, loss, backward, clipping, AdamW; rows of 5 to 25 tokens."""
    cfg = composed.configuration([
        "objective=simcse_unsup", *TWO_LAYERS, "model.pooling=cls", "data.batch_size=64", "data.max_length=32"
    ])  # fmt: skip
    objective = build(cfg.objective).train()
    optimizer, ids, length = objective.optimizer(objective), torch.arange(n), 5 + torch.arange(n) % 21
    text = TokenBatch(torch.randint(1000, 20_000, (int(length.sum()),)), length)
    batch = Batch((text,), ids, torch.full_like(ids, -1), ids, ids[None])

    def work() -> None:
        optimizer.zero_grad(set_to_none=True)
        anchors = objective.embed(objective.prepare(batch))
        terms = objective.loss(anchors, anchors)
        (terms.loss_sum / terms.normalizer).backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()

    return work


def length(n: int) -> Work:
    """Mean pooling: every token is computed in every layer."""
    encoder: Encoder = build(composed.configuration([*overrides(Task([[]], 64)), "model.pooling=mean"]).model).train()
    rows = TokenBatch(torch.randint(1000, 20_000, (TOKENS,)), torch.full((TOKENS // n,), n))

    def work() -> None:
        encoder.zero_grad(set_to_none=True)
        F.normalize(encoder(rows), dim=-1).sum().backward()

    return work


KINDS = {"loss": loss, "step": step, "length": length}


def measured(kind: str, n: int, small: int) -> dict[str, float]:
    """The least of the seconds of as many runs as ten seconds hold, and the MiB that they took beyond what was there."""
    KINDS[kind](small)()  # what is loaded at the first call is nobody's
    work = KINDS[kind](n)
    before, times = status("VmRSS"), []
    while not times or (len(times) < 3 and sum(t[0] for t in times) < 10):
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        times.append((time.perf_counter() - wall, time.process_time() - cpu))
    return {"wall": min(t[0] for t in times), "cpu": min(t[1] for t in times), "mib": (status("VmHWM") - before) / MIB}


def grown(rows: Sequence[dict[str, Any]], kind: str) -> dict[str, Any]:
    """The exponents."""
    own = [row for row in rows if row["kind"] == kind]
    return {"kind": kind, **{name: exponent([(row["n"], row[name]) for row in own]) for name in ("cpu", "mib")}}


def main() -> None:
    """Measure, print, write."""
    options = arguments()
    torch.set_num_threads(options.threads)
    if options.alone:
        kind, n = options.kinds[0], options.sizes[0]
        print("\n" + json.dumps(measured(kind, n, SIZES[kind][0])))
        return
    rows = []
    for kind in options.kinds:
        for n in options.sizes or SIZES[kind]:
            print(kind, n, flush=True)
            given = ["--alone", "--kinds", kind, "--sizes", n, "--threads", options.threads]
            rows.append({"kind": kind, "n": n, **alone("benchmarks.growth", *given)})
    growth = [grown(rows, kind) for kind in options.kinds]
    for one in growth:
        powers = {name: f"N^{e:.2f}" for name, e in one.items() if isinstance(e, float)}
        print(one["kind"], *(f"{name} grows as {power}" for name, power in powers.items()))
    write(options.output, rows, {"growth": growth, **surroundings(options.threads)})


if __name__ == "__main__":
    main()
