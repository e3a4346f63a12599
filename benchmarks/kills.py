"""A run that is killed at random moments, again and again, ends with the weights of one that was not.

    python -m benchmarks.kills                       20 kills, about a quarter of an hour on one core
    python -m benchmarks.kills --kills 2 --steps 20

SIGKILL, at moments drawn between the start of the process and the end of the training: while it loads, steps, or writes a
checkpoint. The same command with ``resume=true`` goes on. A small random BERT with dropout; weights are compared bit by bit.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import write
from benchmarks.shapes import MODEL
from benchmarks.texts import sentences
from benchmarks.turns import surroundings

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Kill a run again and again.")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/kills.json"))
    return parser.parse_args()


def command(folder: Path, texts: Path, steps: int) -> list[str]:
    """A run that writes a checkpoint every other step."""
    return [
        sys.executable, "train.py", "data=text", f"data.path={texts}", "model=bert_small", f"model.tokenizer.name={MODEL}",
        *(f"model.backbone.config.{name}={value}" for name, value in SIZES.items()), "objective=simcse_unsup", "num_threads=1",
        f"trainer.max_steps={steps}", "trainer.max_epochs=-1", "data.batch_size=16", "save_every=2", "measure_before=false",
        "logger=none", "evaluation@test=none", "callback.progress=null", f"output_dir={folder}", "resume=true",
    ]  # fmt: skip


def taken(given: list[str]) -> float:
    """Seconds of a whole run."""
    start = time.perf_counter()
    subprocess.run(given, cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - start


def step_of(folder: Path) -> int:
    """Of the newest checkpoint."""
    path = folder / "checkpoints" / "last.ckpt"
    return int(torch.load(path, weights_only=True)["global_step"]) if path.is_file() else 0


def killed(given: list[str], folder: Path, kills: int, seconds: float, draw: random.Random) -> list[dict[str, Any]]:
    """A row for each life of the run."""
    rows: list[dict[str, Any]] = []
    while True:
        limit = draw.uniform(0.3 * seconds, seconds) if len(rows) < kills else None
        start = time.perf_counter()
        process = subprocess.Popen(given, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            _, said = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            rows.append({"life": len(rows) + 1, "seconds": time.perf_counter() - start, "checkpoint": step_of(folder)})
            print(rows[-1], flush=True)
            continue
        if process.returncode:
            raise SystemExit(said)
        return rows


def main() -> None:
    """Run once whole and once in pieces; compare."""
    options = arguments()
    os.environ["PYTHONPATH"] = str(ROOT)
    place = Path(tempfile.mkdtemp())
    texts = place / "texts.txt"
    texts.write_text("\n".join(sentences(2000)) + "\n")
    whole, pieces = place / "whole", place / "pieces"
    loading = taken(command(place / "short", texts, 2))
    training = taken(command(whole, texts, options.steps)) - loading
    # A life is at most what loads and makes twice its share of the steps: the run is not over before the last kill.
    longest = loading + 2 * training / (options.kills + 1)
    rows = killed(command(pieces, texts, options.steps), pieces, options.kills, longest, random.Random(options.seed))
    one, other = (torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True) for folder in (whole, pieces))
    same = all(torch.equal(value, other["state_dict"][name]) for name, value in one["state_dict"].items())
    print(f"{len(rows)} kills; the weights after step {other['global_step']} are {'bit-identical' if same else 'NOT THE SAME'}")
    write(options.output, rows, {"identical": same, "steps": options.steps, **surroundings(1)})
    raise SystemExit(not same)


if __name__ == "__main__":
    main()
