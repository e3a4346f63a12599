"""SentEval's classification tasks, by logistic regressions that are fitted by the hundred: all folds and penalties at once."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tercet.errors import InputError, require
from tercet.evaluation.inputs import Floats, Strings, check_tasks, clean_sentence, encode_once, join_parts, read_tasks
from tercet.evaluation.senteval import SentEval
from tercet.paths import locate
from tercet.types import EncodeFunction

# The splits of each task in SentEval's protocol; "all" is split by cross-validation.
TRANSFER_SPLITS: dict[str, tuple[str, ...]] = dict.fromkeys(("MR", "CR", "SUBJ", "MPQA"), ("all",))
TRANSFER_SPLITS |= {"SST2": ("train", "dev", "test"), "TREC": ("train", "test"), "MRPC": ("train", "test")}
TRANSFER_TASKS = tuple(TRANSFER_SPLITS)
PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2)  # SentEval's grid
STEPS, HISTORY, HALVINGS = 200, 10, 20  # of L-BFGS
TOLERANCE = 1e-7  # half the squared length of the gradient where the curvature is about 1
MAX_SCORES = 1 << 25  # numbers in a matrix of scores

Objective = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class LabeledSentences:
    """N rows of a task: ``label (N,)`` from 0, ``split (N,)``; ``second`` is None where a row is one sentence."""

    first: Sequence[str]
    second: Sequence[str] | None
    label: Tensor
    split: Strings


@dataclass(frozen=True)
class Transfer:
    r"""Accuracy of logistic regression on embeddings, its L2 penalty chosen without the test rows.

    MR, CR, SUBJ, MPQA: by ``folds``-fold cross-validation, the penalty by cross-validation within each training part; TREC,
    MRPC (a pair of vectors u, v is |u - v| and u v): by that of the training rows; SST2: by the dev rows. Folds are
    stratified and drawn from ``seed``. ``tasks`` are the sets that are measured. ``path`` is SentEval's folder, or a table
    with the columns task, split, sentence1, sentence2 and label. ``device`` is where the classifiers are fitted: cpu, cuda,
    or auto. ``transfer/<task>/accuracy``, ``transfer/mrpc/f1`` of the label that comes last, and ``transfer/avg/accuracy``,
    the unweighted mean over tasks.

    The classifiers are the minima; SentEval looks for them by Adam and stops early. Accuracies differ by a point or so, more on
    short vectors or few rows (``python -m benchmarks.senteval``).

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "transfer.csv")
    >>> _ = path.write_text("\n".join(["task,split,sentence1,sentence2,label", *["CR,all,good,,1", "CR,all,bad,,0"] * 4]))
    >>> Transfer(path, ["CR"], folds=2)(lambda texts: torch.tensor([[len(text)] for text in texts]))
    {'transfer/cr/accuracy': 1.0}
    """

    path: str | Path
    tasks: Sequence[str] = TRANSFER_TASKS
    folds: int = 10
    seed: int = 1111
    device: str = "auto"
    smaller_is_better: ClassVar[frozenset[str]] = frozenset()
    _fitted: dict[str, tuple[bytes, Tensor]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_tasks(self.tasks, TRANSFER_TASKS)
        require(self.folds >= 2, f"`folds`={self.folds}: 2 or more; SentEval has 10.")
        usable = ("auto", "cpu", *(["cuda"] if torch.cuda.is_available() else []))
        require(self.device in usable, f"`device`={self.device}: auto or cpu, or cuda where torch sees a GPU.")

    @cached_property
    def data(self) -> dict[str, LabeledSentences]:
        """By task, read at first use."""
        tasks = [task for task in TRANSFER_TASKS if task in self.tasks]
        if (folder := locate(str(self.path))).is_dir():
            senteval = SentEval(folder, self.path)
            rows = {task: senteval.transfer(task) for task in tasks}
        else:
            rows = read_tasks(self.path, ("task", "split", "sentence1", "sentence2", "label"), tasks)
        return {task: _labeled_sentences(self.path, task, some) for task, some in rows.items()}

    def __call__(self, encode: EncodeFunction) -> dict[str, float]:
        """Measure, with one call of ``encode``."""
        metrics: dict[str, float] = {}
        for task, (guess, test) in self._guesses(encode).items():
            data = self.data[task]
            metrics[f"transfer/{task.lower()}/accuracy"] = float(_accuracy(guess, data.label, test).mean())
            if data.second is not None:
                from torchmetrics.functional.classification import binary_f1_score

                guessed, true = ((side[test[0]] == data.label.max()).long() for side in (guess[0], data.label))
                metrics[f"transfer/{task.lower()}/f1"] = float(binary_f1_score(guessed, true))
        accuracies = [value for name, value in metrics.items() if name.endswith("/accuracy")]
        if len(accuracies) > 1:
            metrics["transfer/avg/accuracy"] = sum(accuracies) / len(accuracies)
        return metrics

    def examples(self, encode: EncodeFunction) -> dict[str, Floats]:
        """Whether each test row is classified right, ``(N,)``, fold by fold; scaled where folds have unequal sizes."""
        rights = {task: (guess == self.data[task].label, test) for task, (guess, test) in self._guesses(encode).items()}
        parts = {task: join_parts([x[rows] for x, rows in zip(*both, strict=True)]) for task, both in rights.items()}
        values = {f"transfer/{task.lower()}/accuracy": part for task, part in parts.items()}
        return values | ({"transfer/avg/accuracy": join_parts([*parts.values()])} if len(parts) > 1 else {})

    def _guesses(self, encode: EncodeFunction) -> dict[str, tuple[Tensor, Tensor]]:
        """By task the classes that are predicted for all rows ``(J, N)``, and the J test sets ``(J, N)``.

        The last ones are kept, for the embeddings that they are of: ``examples`` after ``__call__`` need not fit anew.
        """
        embed = encode_once(encode, [x for data in self.data.values() for x in (*data.first, *(data.second or ()))], "transfer")
        device = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        found = {}
        for task, data in self.data.items():
            x = embed(data.first)
            if data.second is not None:
                other = embed(data.second)
                x = torch.cat([(x - other).abs(), x * other], 1)
            splits = self._splits(data, f"`path`={self.path}, {task}")
            content = hashlib.blake2b(x.numpy().data, digest_size=16).digest()
            if self._fitted.get(task, (b"",))[0] != content:
                self._fitted[task] = content, self._fit(x.to(device), data, splits).cpu()
            found[task] = self._fitted[task][1], splits[0]
        return found

    def _fit(self, x: Tensor, data: LabeledSentences, splits: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Fit on the training rows of each of J test sets, with the penalty that K held-out sets choose; classes ``(J, N)``."""
        y = data.label.to(x.device)
        test, train, held = (rows.to(x.device) for rows in splits)
        fitted = train[:, None] & ~held
        if (train[:, None] & held).any():  # else they are rows of their own, and all training rows are fitted already
            fitted = torch.cat([fitted, train[:, None]], 1)
        sets, penalty = fitted.flatten(0, 1), torch.tensor(PENALTIES, device=x.device)  # each set with every penalty
        classes = fit_predict(x, y, sets.repeat_interleave(len(penalty), 0), penalty.repeat(len(sets)))
        classes = classes.unflatten(0, (*fitted.shape[:2], len(penalty)))  # (J, K or K + 1, penalties, N)
        best = _accuracy(classes[:, : held.shape[1]], y, held[:, :, None]).mean(1).argmax(1)
        return cast(Tensor, classes[torch.arange(len(test)), -1, best.cpu()])

    def _splits(self, data: LabeledSentences, where: str) -> tuple[Tensor, Tensor, Tensor]:
        """The test rows ``(J, N)``, their training rows ``(J, N)``, and the rows that choose a penalty ``(J, K, N)``."""
        rows = {name: torch.from_numpy(data.split == name)[None] for name in set(data.split)}
        if "dev" in rows:
            return rows["test"], rows["train"], rows["dev"][None]
        if "test" in rows:
            return rows["test"], rows["train"], self._held_out(data.label, rows["train"][0], self.seed, where)[None]
        test = self._held_out(data.label, rows["all"][0], self.seed, where)
        where += ", the training part of a fold"
        return test, ~test, torch.stack([self._held_out(data.label, ~out, self.seed + 1, where) for out in test])

    def _held_out(self, label: Tensor, rows: Tensor, seed: int, where: str) -> Tensor:
        """``(K, N)``: which of the ``rows`` each fold holds out."""
        held = torch.zeros(self.folds, len(label), dtype=torch.bool)
        held[:, rows] = stratified_folds(label[rows], self.folds, seed, where) == torch.arange(self.folds)[:, None]
        return held

    def table(self, metrics: Mapping[str, float]) -> str:
        """Format SentEval's table, times 100, of metrics named as they were returned."""
        found = {task: metrics.get(f"transfer/{task.lower()}/accuracy") for task in (*TRANSFER_TASKS, "avg")}
        columns = {"Avg." if task == "avg" else task: value for task, value in found.items() if value is not None}
        lines = ["Transfer, accuracy x100", "".join(f"{title:>8}" for title in columns)]
        lines.append("".join(f"{100 * x:>8.2f}" for x in columns.values()))
        if missing := [task for task in TRANSFER_TASKS if found[task] is None]:
            lines.append(f"Not measured: {', '.join(missing)}. The paper's average is over all {len(TRANSFER_TASKS)} tasks.")
        return "\n".join(lines)


def _labeled_sentences(path: str | Path, task: str, rows: Sequence[Mapping[str, Any]]) -> LabeledSentences:
    """Check and convert the rows of a task."""
    splits, sides = TRANSFER_SPLITS[task], ("sentence1", "sentence2") if task == "MRPC" else ("sentence1",)
    if lacking := sorted(set(splits) - {row["split"] for row in rows}, key=splits.index):
        raise InputError(f"`path`={path} has no {lacking[0]} rows of {task}. Add them, or leave {task} out of `tasks`.")
    sentences: list[list[str]] = []
    for row in rows:
        where, split = row["where"], row["split"]
        fault = f"the split is {split!r}; {task} has {', '.join(splits)}"
        require(split in splits, f"{where}: {fault}. Correct or remove the row.")
        require(row["label"] not in (None, ""), f"{where}: there is no label. Correct or remove the row.")
        sentences.append([clean_sentence(row[side], side, where) for side in sides])
    names, label = np.unique([str(row["label"]) for row in rows], return_inverse=True)
    require(len(names) > 1, f"`path`={path}, {task}: every label is {names[0]}; there is nothing to tell apart.")
    first, *second = (list(column) for column in zip(*sentences, strict=True))
    split = np.array([row["split"] for row in rows], dtype=np.str_)
    return LabeledSentences(first, second[0] if second else None, torch.from_numpy(label), split)


def stratified_folds(label: Tensor, folds: int, seed: int, where: str) -> Tensor:
    """Draw the fold of each row ``(N,)``, so that every label ``(N,)`` has its share in each; ``where`` names the data."""
    for number, rows in enumerate(torch.bincount(label).tolist()):
        fault = f"the label number {number} (in alphabetical order) has {rows} rows, fewer than the {folds} folds"
        advice = f"Use `folds`={max(2, rows)}, add rows or leave the task out of `tasks`."
        require(rows == 0 or rows >= folds, f"{where}: {fault}. {advice}")
    order = torch.rand(len(label), generator=torch.Generator().manual_seed(seed)).argsort()
    order = order[label[order].argsort(stable=True)]  # by label, at random among equals
    fold = torch.empty_like(label)
    fold[order] = torch.arange(len(label)) % folds
    return fold


def _accuracy(guess: Tensor, y: Tensor, rows: Tensor) -> Tensor:
    return torch.div(((guess == y) & rows).sum(-1), rows.sum(-1))


def fit_predict(x: Tensor, y: Tensor, train: Tensor, penalty: Tensor) -> Tensor:
    """``(J, N)``: the class that each of J classifiers predicts for each of ``x (N, D)``.

    Classifier j minimizes the mean cross entropy of ``y (N,)``, classes from 0, over the rows of ``train (J, N)``, plus
    ``penalty (J,)`` / 2 times the squared length of its weights; the bias is free. Two classes share one column of weights,
    as in scikit-learn, whose ``C`` is 1 / (penalty x rows). A step of all J is two products of matrices.
    """
    columns = 1 if (classes := int(y.max()) + 1) == 2 else classes
    x = x.float() - x.float().mean(0)  # the same problem, centered, in the axes of its covariance, with a column of ones
    # numpy's LAPACK: torch's, of MKL 2024.2, does not converge on CPUs with AVX-512 where parts of the matrix are zero.
    variance, axes = map(torch.from_numpy, np.linalg.eigh((x.T @ x).cpu().double().numpy() / len(x)))
    scale = F.pad(variance.clamp_min(0).to(x), (0, 1), value=1.0)
    curvature = scale * (0.25 if columns == 1 else 0.5)  # an upper bound of the second derivative (Böhning 1992)
    x = F.pad(x @ axes.to(x), (0, 1), value=1.0)
    size = max(1, MAX_SCORES // (len(x) * columns))
    parts = zip(train.split(size), penalty.float().split(size), strict=True)
    return torch.cat([_fit_some(x, y, rows, some, curvature, columns) for rows, some in parts])


def _fit_some(x: Tensor, y: Tensor, train: Tensor, penalty: Tensor, curvature: Tensor, columns: int) -> Tensor:
    jobs, (rows, dim) = len(train), x.shape
    ridge = F.pad(penalty[:, None].expand(-1, dim - 1), (0, 1))  # (J, D + 1)
    root = (curvature + ridge).clamp_min(1e-12).sqrt()  # weights in units in which all curvatures are about 1
    share = (train / train.sum(1, keepdim=True)).to(x).T  # (N, J)
    target = y.to(x)[:, None] if columns == 1 else F.one_hot(y, columns).to(x)[:, None]

    def objective(v: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        w = v.view(len(which), columns, dim) / root[which, None]
        scores = (x @ w.view(-1, dim).T).view(rows, len(which), columns)
        part = share[:, which]
        if columns == 1:
            loss = F.softplus(scores[..., 0]) - scores[..., 0] * target
            slope = (scores.sigmoid() - target[..., None]) * part[..., None]
        else:
            loss = scores.logsumexp(-1) - (scores * target).sum(-1)
            slope = (scores.softmax(-1) - target) * part[..., None]
        value = (loss * part).sum(0, dtype=torch.double) + 0.5 * (ridge[which, None] * w**2).sum((1, 2))
        gradient = (slope.view(rows, -1).T @ x).view_as(w) + ridge[which, None] * w
        return value, (gradient / root[which, None]).flatten(1)

    v = minimize(objective, x.new_zeros(jobs, columns * dim))
    scores = (x @ (v.view(jobs, columns, dim) / root[:, None]).view(-1, dim).T).view(rows, jobs, columns)
    return ((scores[..., 0] > 0).long() if columns == 1 else scores.argmax(-1)).T


def minimize(objective: Objective, start: Tensor) -> Tensor:
    """Minimize J functions at once, to ``(J, P)``: L-BFGS (Liu and Nocedal 1989), each with its own steps.

    ``objective(v (j, P), which (j,)) -> values (j,), gradients (j, P)`` of the functions numbered ``which``.
    """
    best = start.clone()
    which = torch.arange(len(start), device=start.device)
    v, (value, gradient) = start, objective(start, which)
    history: list[tuple[Tensor, Tensor]] = []  # the last steps, and the changes of gradients in them
    for _ in range(STEPS):
        direction = -_inverse_curvature(gradient, history)
        new, value, change = _line_search(objective, v, which, value, gradient, direction)
        step, v, gradient = new - v, new, gradient + change
        history = [*history[1 - HISTORY :], (step, change)]
        best[which] = v
        active = (0.5 * gradient.square().sum(1) > TOLERANCE) & (step != 0).any(1)
        if not active.any():
            break
        which, v, value, gradient = which[active], v[active], value[active], gradient[active]
        history = [(step[active], change[active]) for step, change in history]
    return best


def _inverse_curvature(gradient: Tensor, history: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The gradient times the inverse curvature that the history shows."""
    q, alphas = gradient, []
    rhos = [1 / (s * t).sum(1, keepdim=True).clamp_min(1e-12) for s, t in history]
    for (s, t), rho in zip(reversed(history), reversed(rhos), strict=True):
        alphas.append(rho * (s * q).sum(1, keepdim=True))
        q = q - alphas[-1] * t
    for s, t in history[-1:]:
        q = q * ((s * t).sum(1) / t.square().sum(1).clamp_min(1e-12))[:, None]
    for (s, t), rho, alpha in zip(history, rhos, reversed(alphas), strict=True):
        q = q + s * (alpha - rho * (t * q).sum(1, keepdim=True))
    return q


def _line_search(
    objective: Objective, v: Tensor, which: Tensor, value: Tensor, gradient: Tensor, direction: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One step each, halved until it descends: new points, their values, the changes of the gradients."""
    slope = (gradient * direction).sum(1)
    step = torch.ones_like(slope)
    new, (new_value, new_gradient) = v + direction, objective(v + direction, which)
    for _ in range(HALVINGS):
        high = new_value > value + 1e-4 * step * slope + 1e-7 * value.abs()
        if not high.any():
            break
        step[high] /= 2
        new[high] = v[high] + step[high, None] * direction[high]
        new_value[high], new_gradient[high] = objective(new[high], which[high])
    new[high], new_value[high], new_gradient[high] = v[high], value[high], gradient[high]
    return new, new_value, new_gradient - gradient
