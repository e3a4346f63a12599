"""An STS pass beside one in SentEval's manner: pairs sorted by length, 128 at a time, both sides padded, no text remembered.

    python -m benchmarks.evaluation                  a fifth of the pairs, two minutes
    python -m benchmarks.evaluation --share 1        all, ten minutes

all-MiniLM-L6-v2, mean pooling. SentEval reads the training and development pairs of STS-B and SICK-R too, whose scores
nobody reports; that is a row of its own.
"""

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from scipy.stats import spearmanr
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from benchmarks.report import write
from benchmarks.shapes import MODEL
from benchmarks.turns import surroundings
from tercet.app.commands.evaluate import open_model
from tercet.evaluation import STS
from tercet.models import CachedEncoder
from tercet.models.pretrained import resolve_source

BATCH = 128
GOAL = 5.0


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="An STS pass beside SentEval's manner.")
    parser.add_argument("--share", type=float, default=0.2, help="of the pairs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/evaluation.json"))
    return parser.parse_args()


class SentEval:
    """One set after the other, as the SimCSE repository's batcher does it."""

    def __init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(resolve_source(MODEL, "model"))
        self.model = AutoModel.from_pretrained(resolve_source(MODEL, "model"), add_pooling_layer=False).eval()

    @torch.no_grad()
    def batcher(self, texts: Sequence[str]) -> Tensor:
        """``(n, D)``, the mean of the tokens."""
        given = self.tokenizer(list(texts), padding=True, truncation=True, max_length=256, return_tensors="pt")
        hidden = self.model(**given).last_hidden_state
        mask = given["attention_mask"][..., None]
        return (hidden * mask).sum(1) / mask.sum(1)

    def __call__(self, pairs: pd.DataFrame) -> float:
        """Spearman's correlation over the pairs of one set."""
        rows = sorted(
            zip(pairs.sentence1, pairs.sentence2, pairs.score, strict=True), key=lambda row: (len(row[0]), len(row[1]), row[2])
        )
        cosines = []
        for i in range(0, len(rows), BATCH):
            first, second, _ = zip(*rows[i : i + BATCH], strict=True)
            for x, y in zip(self.batcher(first), self.batcher(second), strict=True):
                cosines.append(float(torch.dot(x, y) / (x.norm() * y.norm())))
        return float(spearmanr(cosines, [score for *_, score in rows]).statistic)


def timed(work: Any) -> tuple[float, Any]:
    """CPU seconds, and what comes of it."""
    start = time.process_time()
    found = work()
    return time.process_time() - start, found


def main() -> None:
    """Measure, print, write."""
    options = arguments()
    torch.set_num_threads(options.threads)
    root = os.environ.get("TERCET_DATA")
    if not root:
        raise SystemExit("TERCET_DATA is not set: there are no STS pairs.")
    table = pd.read_parquet(f"{root}/sts.parquet").sample(frac=options.share, random_state=0)
    path = Path(options.output).with_suffix(".parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_parquet(path)
    encoder, senteval = open_model(MODEL, None, "cpu"), SentEval()
    tasks = [task for task in ("STS12", "STS13", "STS14", "STS15", "STS-B") if task in set(table.task)]
    ours, metrics = timed(lambda: STS(str(path), tasks, "test")(CachedEncoder(encoder)))
    sets = {name: group for name, group in table.groupby(["task", "split"])}
    seconds = {name: timed(lambda pairs=pairs: senteval(pairs)) for name, pairs in sets.items()}
    reported = [name for name in seconds if name[1] == "test"]
    same = sum(seconds[name][0] for name in reported)
    rows = [
        {"name": "tercet, the sets that are reported", "cpu": ours, "ratio": 1.0},
        {"name": "SentEval's manner, the same sets", "cpu": same, "ratio": same / ours},
        {"name": "SentEval's manner, all that it reads", "cpu": (every := sum(t for t, _ in seconds.values())),
         "ratio": every / ours, "goal": GOAL},
    ]  # fmt: skip
    theirs = seconds["STS-B", "test"][1]
    assert abs(theirs - metrics["sts/stsb/spearman"]) < 1e-3, "the two do not measure the same"
    write(options.output, rows, {"pairs": len(table), **surroundings(options.threads)})


if __name__ == "__main__":
    main()
