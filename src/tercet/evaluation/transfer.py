"""Cross-validation: which rows are held out when."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tercet.errors import InputError
from tercet.evaluation.logistic import fit_predict
from tercet.evaluation.task_data import TRANSFER_TASKS, LabeledSentences, read_transfer
from tercet.types import EncodeFunction


def stratified_folds(label: Tensor, folds: int, seed: int, what: str) -> Tensor:
    """``(N,)`` the fold of each row, so that every label (N,) has its share in each; drawn from ``seed``.

    Raises:
        InputError: a label has fewer rows than there are folds, so that one would lack it; ``what`` names the data.
    """
    counts = torch.bincount(label)
    if few := [i for i, n in enumerate(counts.tolist()) if 0 < n < folds]:
        raise InputError(
            f"{what}: the label number {few[0]} (in alphabetical order) has {int(counts[few[0]])} rows, fewer than the "
            f"{folds} folds; one would lack it. Use evaluation.folds={max(2, int(counts[few[0]]))}, add rows or leave "
            "the task out of evaluation.tasks."
        )
    draw = torch.rand(len(label), generator=torch.Generator().manual_seed(seed))
    order = draw.argsort()
    order = order[label[order].argsort(stable=True)]  # by label, at random among equals
    fold = torch.empty_like(label)
    fold[order] = torch.arange(len(label)) % folds
    return fold


PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2)  # SentEval's grid


@dataclass(frozen=True)
class Transfer:
    """Logistic regression on ready vectors, its L2 penalty chosen without the test rows.

    - MR, CR, SUBJ, MPQA: ``folds``-fold cross-validation, the penalty by cross-validation within each training part;
    - TREC, MRPC: the penalty by cross-validation of the training rows; a pair of vectors u, v is |u - v| and u v;
    - SST2: the penalty by the dev rows.

    Folds are stratified and drawn from ``seed``. ``path`` is a table with the columns task, split, sentence1, sentence2
    and label. ``device`` is where the classifiers are fitted: cpu, cuda, or auto.

    ``transfer/<task>/accuracy``, ``transfer/mrpc/f1`` of the label that comes last, and ``transfer/avg/accuracy``, the
    unweighted mean over tasks if several are there.
    """

    path: str
    tasks: Sequence[str]
    folds: int
    seed: int
    device: str

    def __post_init__(self) -> None:
        if isinstance(self.tasks, str) or not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise InputError(f"evaluation.tasks={self.tasks}: a list without repetitions, of {', '.join(TRANSFER_TASKS)}.")
        for task in self.tasks:
            if task not in TRANSFER_TASKS:
                near = difflib.get_close_matches(str(task).upper().replace("-", ""), TRANSFER_TASKS, 1)
                hint = f" Did you mean {near[0]}?" if near else ""
                raise InputError(f"evaluation.tasks has {task}: there are {', '.join(TRANSFER_TASKS)}.{hint}")
        if self.folds < 2:
            raise InputError(f"evaluation.folds={self.folds}: 2 or more; SentEval has 10.")
        if self.device not in ("auto", "cpu", "cuda") or (self.device == "cuda" and not torch.cuda.is_available()):
            raise InputError(f"evaluation.device={self.device}: auto or cpu, or cuda where torch sees a GPU.")

    @cached_property
    def data(self) -> dict[str, LabeledSentences]:
        """By task; read at the first use, once."""
        return read_transfer(self.path, [task for task in TRANSFER_TASKS if task in self.tasks])

    def __call__(self, encode: EncodeFunction) -> dict[str, float]:
        """All metrics, from one call of ``encode`` with each distinct sentence once."""
        texts = list(dict.fromkeys(text for d in self.data.values() for side in (d.first, d.second or ()) for text in side))
        place, z = {text: i for i, text in enumerate(texts)}, encode(texts)
        if not z.isfinite().all():
            raise InputError("transfer: an embedding is not finite. Use another checkpoint.")
        device = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        metrics: dict[str, float] = {}
        for task, data in self.data.items():
            u, *v = (z[[place[t] for t in side]] for side in (data.first, data.second) if side is not None)
            x = torch.cat([(u - v[0]).abs(), u * v[0]], 1) if v else u
            metrics |= {f"transfer/{task.lower()}/{k}": n for k, n in self._scores(task, x.to(device), data).items()}
        accuracies = [value for name, value in metrics.items() if name.endswith("/accuracy")]
        if len(accuracies) > 1:
            metrics["transfer/avg/accuracy"] = sum(accuracies) / len(accuracies)
        return metrics

    def _scores(self, task: str, x: Tensor, data: LabeledSentences) -> dict[str, float]:
        y, what = data.label.to(x.device), f"evaluation.path={self.path}, {task}"
        rows = {name: torch.from_numpy(data.split == name).to(x.device) for name in set(data.split)}
        if "all" in rows:
            return {"accuracy": self._nested(x, y, what)}
        if "dev" in rows:
            found = _fits(x, y, rows["train"][None])[0]
            best = _accuracy(found, y, rows["dev"]).argmax()
            guess = found[best]
        else:
            held = self._held(data.label, rows["train"].cpu(), self.seed, what).to(x.device)
            found = _fits(x, y, torch.cat([rows["train"] & ~held, rows["train"][None]]))
            best = _accuracy(found[:-1], y, held[:, None]).mean(0).argmax()
            guess = found[-1, best]
        scores = {"accuracy": float(_accuracy(guess, y, rows["test"]))}
        return scores | ({"f1": _f1(guess, y, rows["test"])} if data.second is not None else {})

    def _nested(self, x: Tensor, y: Tensor, what: str) -> float:
        """Mean accuracy over outer folds, each with the penalty that its own training rows choose."""
        whole = torch.ones(len(y), dtype=torch.bool)
        outer = self._held(y.cpu(), whole, self.seed, what)
        inner = torch.stack(
            [self._held(y.cpu(), ~out, self.seed + 1, f"{what}, the training part of a fold") for out in outer]
        )  # (K, K, N)
        train = torch.cat([~outer[:, None] & ~inner, ~outer[:, None]], 1).to(x.device)
        found = _fits(x, y, train.flatten(0, 1)).unflatten(0, train.shape[:2])  # (K, K + 1, penalties, N)
        scores = _accuracy(found[:, :-1], y, inner[:, :, None].to(x.device)).mean(1)
        best = scores.argmax(1)
        guess = found[torch.arange(self.folds), -1, best.cpu()]
        return float(_accuracy(guess, y, outer.to(x.device)).mean())

    def _held(self, label: Tensor, rows: Tensor, seed: int, what: str) -> Tensor:
        """``(K, N)`` which of the ``rows`` each fold holds out."""
        held = torch.zeros(self.folds, len(label), dtype=torch.bool)
        held[:, rows] = stratified_folds(label[rows], self.folds, seed, what) == torch.arange(self.folds)[:, None]
        return held

    def table(self, metrics: Mapping[str, float]) -> str:
        """SentEval's table, of metrics as they were returned."""
        return f"Transfer, accuracy x100\n{transfer_table(metrics, '')}"


def transfer_table(metrics: Mapping[str, float], prefix: str) -> str:
    """Plain text, times 100; ``prefix`` stands before ``transfer/`` in the names, as ``test/``."""
    found = {task: metrics.get(f"{prefix}transfer/{task.lower()}/accuracy") for task in (*TRANSFER_TASKS, "avg")}
    columns = {"Avg." if task == "avg" else task: value for task, value in found.items() if value is not None}
    lines = ["".join(f"{title:>8}" for title in columns), "".join(f"{100 * x:>8.2f}" for x in columns.values())]
    if missing := [task for task in TRANSFER_TASKS if found[task] is None]:
        lines.append(f"Not measured: {', '.join(missing)}. The paper's average is over all {len(TRANSFER_TASKS)} tasks.")
    return "\n".join(lines)


def _fits(x: Tensor, y: Tensor, train: Tensor) -> Tensor:
    """``(J, penalties, N)`` classes, of J sets of training rows ``(J, N)``, each with every penalty."""
    penalty = torch.tensor(PENALTIES, device=x.device)
    each = train.repeat_interleave(len(penalty), 0)
    found = fit_predict(x, y, each, penalty.repeat(len(train)))
    return found.view(len(train), len(penalty), -1)


def _accuracy(guess: Tensor, y: Tensor, rows: Tensor) -> Tensor:
    """Of classes ``(..., N)`` over the chosen ``rows (..., N)``."""
    hits: Tensor = (guess == y) & rows
    share: Tensor = hits.sum(-1) / rows.sum(-1)
    return share


def _f1(guess: Tensor, y: Tensor, rows: Tensor) -> float:
    positive = int(y.max())
    hits = ((guess == positive) & (y == positive) & rows).sum()
    said, true = ((guess == positive) & rows).sum(), ((y == positive) & rows).sum()
    return float(2 * hits / (said + true))
