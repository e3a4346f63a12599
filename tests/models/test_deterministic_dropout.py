"""Seeded dropout has the distribution of torch's dropout."""

import math

import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from tercet.errors import InputError
from tercet.models.engine import deterministic_dropout
from tercet.models.engine.deterministic_dropout import DropoutSeeds, SeededDropout, apply_dropout, replace_dropouts
from tercet.models.engine.transformers_compat import module_number, number_modules


def masks(p, seeded, rows=400, columns=384):
    seed = torch.randint(-(1 << 62), 1 << 62, (1, rows)) if seeded else None
    return apply_dropout(torch.ones(1, rows, columns), p, seed)[0]


@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_elements_are_kept_with_the_right_probability_and_scale(p, seeded):
    z = masks(p, seeded)
    kept = z != 0
    assert torch.equal(z[kept], torch.full_like(z[kept], float(z.max())))
    assert float(z.max()) == pytest.approx(1 / (1 - p), rel=1e-4)
    n = kept.numel()
    assert stats.binomtest(int(kept.sum()), n, 1 - p).pvalue > 1e-4
    for side in (0, 1):  # each row and each column is binomial, too
        counts, m = kept.sum(side).double(), kept.shape[side]
        chi = float(((counts - m * (1 - p)) ** 2 / (m * p * (1 - p))).sum())
        assert stats.chi2.sf(chi, len(counts)) > 1e-4


@pytest.mark.parametrize("seeded", [False, True])
def test_elements_are_independent_of_their_neighbors(seeded):
    kept = (masks(0.5, seeded) != 0).double() - 0.5
    for a, b in ((kept[:, 1:], kept[:, :-1]), (kept[1:], kept[:-1]), (kept[:, 4:], kept[:, :-4])):
        assert abs(float((a * b).mean())) * 4 * math.sqrt(a.numel()) < 4.5


def test_the_gradient_is_that_of_a_product_with_the_mask():
    x = torch.randn(1, 5, 6, dtype=torch.float64, requires_grad=True)
    seed = torch.arange(5)[None]
    mask = apply_dropout(torch.ones_like(x), 0.4, seed).detach()
    g = torch.randn_like(x)
    torch.testing.assert_close(torch.autograd.grad(apply_dropout(x, 0.4, seed), x, g)[0], mask * g)
    assert torch.autograd.gradcheck(lambda x: apply_dropout(x, 0.4, seed), x)


@pytest.mark.parametrize("columns", [1, 7, 384])
def test_what_a_cpu_computes_in_blocks_is_what_it_computes_at_once(columns, monkeypatch):
    x, seed = torch.randn(3, 5, columns, requires_grad=True), torch.arange(15).view(3, 5)
    found = []
    for block in (1, 2 * columns, 1 << 17):
        monkeypatch.setattr(deterministic_dropout, "BLOCK", block)
        out = apply_dropout(x, 0.4, seed)
        found.append((out, *torch.autograd.grad(out.square().sum(), x)))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("p", [0.999999, 1.0])
@pytest.mark.parametrize("seed", [None, torch.arange(5)])
def test_a_rate_of_one_leaves_zeros_in_value_and_gradient(p, seed):
    x = torch.randn(5, 6, requires_grad=True)
    out = apply_dropout(x, p, seed)
    assert out.abs().max() == torch.autograd.grad(out.sum(), x)[0].abs().max() == 0


def test_a_mask_is_a_function_of_seed_and_layer():
    seeds = DropoutSeeds()
    first, second = SeededDropout(0.5, seeds), SeededDropout(0.5, seeds)
    number_modules(torch.nn.ModuleList([first, second]))
    seeds.seed = torch.arange(3)[None]
    x = torch.ones(1, 3, 64)
    assert torch.equal(first(x), first(x))
    assert not torch.equal(first(x), second(x))
    seeds.seed = seeds.seed + 3
    assert not torch.equal(first(x), second(x))
    seeds.seed = None
    assert not torch.equal(first(x), first(x))


def test_evaluation_and_rates_of_0_and_1():
    seeds, x = DropoutSeeds(), torch.randn(1, 3, 8)
    assert torch.equal(SeededDropout(0.5, seeds).eval()(x), x)
    assert torch.equal(SeededDropout(0.0, seeds)(x), x)
    assert not SeededDropout(1.0, seeds)(x).any()


def test_all_dropouts_are_replaced_and_a_wrong_shape_is_refused():
    net = torch.nn.Sequential(torch.nn.Dropout(0.1), torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.2)))
    seeds = replace_dropouts(net)
    found = [m for m in net.modules() if isinstance(m, torch.nn.Dropout)]
    assert [(type(m), m.p) for m in found] == [(SeededDropout, 0.1), (SeededDropout, 0.2)]
    assert len({module_number(m) for m in found}) == 2
    seeds.seed = torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(InputError, match=r"execution\.dropout=torch"):
        net(torch.ones(1, 4, 2))


def test_training_with_it_is_training_with_torchs():
    """The expected value of a step's loss is the same: a mean over many draws, two-sided test."""
    torch.manual_seed(0)
    x, w = torch.randn(200, 32), torch.randn(32)
    values = {
        "ours": [float((apply_dropout(x, 0.3, None) @ w).square().mean()) for _ in range(300)],
        "torch": [float((F.dropout(x, 0.3) @ w).square().mean()) for _ in range(300)],
    }
    assert stats.ks_2samp(values["ours"], values["torch"]).pvalue > 1e-3
