"""Logistic regressions by the hundred: all folds and all penalties of a task at once.

J problems share their N rows and differ in which of them train and in the penalty. A step of all is two products of
matrices, where a library that fits one at a time takes J times two.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

STEPS = 200
HISTORY = 10
TOLERANCE = 1e-7  # half the squared length of the gradient where the curvature is about 1
HALVINGS = 20
AT_ONCE = 1 << 25  # numbers in a matrix of scores

Objective = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def fit_predict(x: Tensor, y: Tensor, train: Tensor, penalty: Tensor) -> Tensor:
    """``(J, N)`` the class that each of J classifiers gives to each of ``x (N, D)``.

    Classifier j minimizes the mean cross entropy of ``y (N,)``, classes from 0, over the rows of ``train (J, N)``, plus
    ``penalty (J,)`` / 2 times the squared length of its weights; the bias is free. Two classes share one column of
    weights, more have one each, as in scikit-learn, whose ``C`` is 1 / (penalty x rows).
    """
    columns = int(y.max()) + 1
    columns = 1 if columns == 2 else columns
    x, scale = _turned(x.float())
    curvature = scale * (0.25 if columns == 1 else 0.5)  # what the second derivative is at most (Böhning 1992)
    size = max(1, AT_ONCE // (len(x) * columns))
    parts = zip(train.split(size), penalty.float().split(size), strict=True)
    return torch.cat([_predicted(x, y, share, some, curvature, columns) for share, some in parts])


def _turned(x: Tensor) -> tuple[Tensor, Tensor]:
    """Centred, in the axes of its covariance, and with a column of ones: ``(N, D + 1)``; its variances ``(D + 1,)``.

    Lengths of weights are as before, and what the bias loses by the centre it can take back: the same problem.
    """
    x = x - x.mean(0)
    variance, axes = torch.linalg.eigh((x.T @ x).double() / len(x))
    ones = x.new_ones(1)
    return torch.cat([x @ axes.to(x), x.new_ones(len(x), 1)], 1), torch.cat([variance.clamp_min(0).to(x), ones])


def _predicted(x: Tensor, y: Tensor, train: Tensor, penalty: Tensor, curvature: Tensor, columns: int) -> Tensor:
    jobs, (rows, dim) = len(train), x.shape
    free = torch.ones(dim, device=x.device)
    free[-1] = 0.0
    ridge = penalty[:, None] * free  # (J, D + 1)
    root = (curvature + ridge).clamp_min(1e-12).sqrt()  # weights are searched in units in which all curves are alike
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
    """``(J, P)`` where J functions are smallest: L-BFGS (Liu and Nocedal 1989), each with its own steps.

    ``objective(v (j, P), which (j,)) -> values (j,), gradients (j, P)`` of the functions numbered ``which``.
    """
    best = start.clone()
    which = torch.arange(len(start), device=start.device)
    v, (value, gradient) = start, objective(start, which)
    moves: list[Tensor] = []
    turns: list[Tensor] = []
    for _ in range(STEPS):
        direction = -_newton(gradient, moves, turns)
        new, value, change = _searched(objective, v, which, value, gradient, direction)
        moves, turns = [*moves[1 - HISTORY :], new - v], [*turns[1 - HISTORY :], change]
        v, gradient = new, gradient + change
        best[which] = v
        open_ = (0.5 * gradient.square().sum(1) > TOLERANCE) & (moves[-1] != 0).any(1)
        if not open_.any():
            break
        which, v, value, gradient = which[open_], v[open_], value[open_], gradient[open_]
        moves, turns = [x[open_] for x in moves], [x[open_] for x in turns]
    return best


def _newton(gradient: Tensor, moves: list[Tensor], turns: list[Tensor]) -> Tensor:
    """The gradient times the inverse curvature that the last moves have shown."""
    q, alphas = gradient, []
    rhos = [1 / (s * t).sum(1, keepdim=True).clamp_min(1e-12) for s, t in zip(moves, turns, strict=True)]
    for s, t, rho in zip(reversed(moves), reversed(turns), reversed(rhos), strict=True):
        alphas.append(rho * (s * q).sum(1, keepdim=True))
        q = q - alphas[-1] * t
    if moves:
        q = q * ((moves[-1] * turns[-1]).sum(1) / turns[-1].square().sum(1).clamp_min(1e-12))[:, None]
    for s, t, rho, alpha in zip(moves, turns, rhos, reversed(alphas), strict=True):
        q = q + s * (alpha - rho * (t * q).sum(1, keepdim=True))
    return q


def _searched(
    objective: Objective, v: Tensor, which: Tensor, value: Tensor, gradient: Tensor, direction: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One step each, halved until it is a descent: new places, their values, the changes of the gradients."""
    slope = (gradient * direction).sum(1)
    step = torch.ones_like(slope)
    new, (found, turned) = v + direction, objective(v + direction, which)
    for _ in range(HALVINGS):
        high = found > value + 1e-4 * step * slope + 1e-7 * value.abs()
        if not high.any():
            break
        step[high] /= 2
        new[high] = v[high] + step[high, None] * direction[high]
        found[high], turned[high] = objective(new[high], which[high])
    new[high], found[high], turned[high] = v[high], value[high], gradient[high]
    return new, found, turned - gradient
