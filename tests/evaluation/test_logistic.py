"""The batched classifiers are the ones that scikit-learn finds one by one."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from tercet.evaluation.transfer import fit_predict, minimize, stratified_folds


def problem(classes, rows=600, dim=20, shift=3.0):
    x = torch.randn(rows, dim) * torch.logspace(0, -3, dim) + shift
    y = ((x - shift) @ torch.randn(dim, classes) + 0.3 * torch.randn(rows, classes)).argmax(1)
    return x, y


@pytest.mark.parametrize("classes", [2, 3, 6])
def test_predictions_are_scikit_learns(classes):
    x, y = problem(classes)
    train = torch.rand(6, len(x)) < 0.8
    penalty = torch.tensor([1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0])
    ours = fit_predict(x, y, train, penalty)
    for j, (rows, size) in enumerate(zip(train, penalty.tolist(), strict=True)):
        peer = LogisticRegression(C=1 / (size * int(rows.sum())), tol=1e-8, max_iter=10_000)
        theirs = peer.fit(x[rows].double().numpy(), y[rows].numpy()).predict(x.double().numpy())
        assert (ours[j].numpy() == theirs).mean() > 0.99


def test_problems_do_not_touch_each_other(monkeypatch):
    x, y = problem(3)
    train, penalty = torch.rand(5, len(x)) < 0.5, torch.logspace(-4, -1, 5)
    together = fit_predict(x, y, train, penalty)
    alone = torch.cat([fit_predict(x, y, train[j : j + 1], penalty[j : j + 1]) for j in range(5)])
    assert (together == alone).float().mean() > 0.999
    monkeypatch.setattr("tercet.evaluation.transfer.MAX_SCORES", 2 * len(x) * 3)
    assert (fit_predict(x, y, train, penalty) == together).float().mean() > 0.999


def test_rows_that_do_not_train_teach_nothing():
    x, y = problem(2)
    train = (torch.arange(len(x)) % 2 == 0)[None]
    other = torch.where(train[0], y, 1 - y)
    assert torch.equal(fit_predict(x, y, train, torch.ones(1) / 100), fit_predict(x, other, train, torch.ones(1) / 100))


def test_columns_that_repeat_or_are_constant_do_no_harm():
    x, y = problem(2)
    same = torch.cat([x, x, torch.ones(len(x), 3)], 1)
    found = fit_predict(same, y, torch.ones(1, len(x), dtype=torch.bool), torch.full((1,), 1e-4))
    assert (found[0] == y).float().mean() > 0.8


def test_minima_of_quadratics():
    root = torch.randn(4, 7, 7, dtype=torch.double)
    matrix, goal = root @ root.mT + torch.eye(7), torch.randn(4, 7, dtype=torch.double)

    def objective(v, which):
        off = v - goal[which]
        pull = (matrix[which] @ off[..., None])[..., 0]
        return 0.5 * (off * pull).sum(1), pull

    torch.testing.assert_close(minimize(objective, torch.zeros_like(goal)), goal, atol=2e-3, rtol=0)


def test_folds_share_labels_evenly():
    label = torch.tensor([0] * 50 + [1] * 31 + [2] * 7)[torch.randperm(88)]
    fold = stratified_folds(label, 5, 3, "x")
    for name, n in ((0, 50), (1, 31), (2, 7)):
        counts = torch.bincount(fold[label == name], minlength=5)
        assert counts.max() - counts.min() <= 1 and counts.sum() == n
    assert torch.bincount(fold).max() - torch.bincount(fold).min() <= 1
    assert torch.equal(fold, stratified_folds(label, 5, 3, "x")) and not torch.equal(fold, stratified_folds(label, 5, 4, "x"))
