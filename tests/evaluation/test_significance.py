"""Differences between systems: against scipy's own tests, by simulation, and what each kind of uncertainty is about."""

import itertools

import numpy as np
import pytest
from scipy import stats

from tercet.evaluation.significance import holm, paired_difference, prediction_interval, randomization_test, randomization_tests


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_difference_that_is_infinite_or_unknown_is_not_sure(bad):
    found = paired_difference([bad, 1.0, 1.1])
    assert found.p == 1 and np.isnan(found.low) and np.isnan(found.high) and found.n == 3


@pytest.mark.parametrize("n", [2, 3, 5, 12])
def test_the_paired_t_test_is_scipys(n):
    a, b = np.random.default_rng(n).normal(size=(2, n))
    found, test = paired_difference(a - b), stats.ttest_rel(a, b)
    assert found.p == pytest.approx(test.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(test.confidence_interval(0.95)))
    assert found.sign_p == pytest.approx(stats.binomtest(int((a > b).sum()), n).pvalue)


def test_equal_differences_need_no_variance():
    assert paired_difference([0.0, 0.0]).p == paired_difference([0.0, 0.0]).sign_p == 1.0
    assert paired_difference([0.1, 0.1, 0.1]).p == 0.0
    assert paired_difference([0.1, 0.1, 0.1]).sign_p == 0.25, "three seeds cannot say more"


def test_holm_is_its_definition():
    p = np.random.default_rng(0).uniform(size=6)
    order = sorted(range(6), key=lambda i: p[i])
    expected = {i: min(1, max(p[j] * (6 - r) for r, j in enumerate(order[: k + 1]))) for k, i in enumerate(order)}
    assert holm(p) == pytest.approx([expected[i] for i in range(6)])
    assert holm([]) == []


@pytest.mark.parametrize(("settings", "seeds"), list(itertools.product((2, 3, 4), (3, 5))))
def test_noise_is_called_a_difference_in_six_of_a_hundred_sweeps_at_most(settings, seeds):
    """Equal settings, with an effect of the seed that all share: any pair below 0.05 after Holm is a false claim."""
    rng = np.random.default_rng(100 * settings + seeds)
    false = 0
    for _ in range(1000):
        values = rng.normal(size=(settings, seeds)) + rng.normal(size=seeds)
        pairs = itertools.combinations(range(settings), 2)
        false += min(holm([paired_difference(values[i] - values[j]).p for i, j in pairs])) < 0.05
    assert false <= 60


def test_randomization_over_examples_finds_what_there_is_and_no_more():
    rng = np.random.default_rng(0)
    right = (rng.uniform(size=400) < 0.7).astype(float)
    better = np.where(rng.uniform(size=400) < 0.2, 1.0, right)
    assert randomization_test(better, right) < 0.001
    assert randomization_test(right, right) == 1.0
    exact = [0.5, 0.2, 0.9], [0.1, 0.3, 0.2]  # 2^3 exchanges, counted
    d = np.subtract(*exact)
    means = [abs(np.mean(d * signs)) for signs in itertools.product((1, -1), repeat=3)]
    assert randomization_test(*exact) == pytest.approx(np.mean([m >= abs(d.mean()) - 1e-12 for m in means]))
    pairs = rng.normal(size=(200, 2, 60))
    p = randomization_tests(pairs[:, 0] - pairs[:, 1])
    assert np.mean(np.array(p) < 0.05) <= 0.09
    for i in range(3):
        d = pairs[i, 0] - pairs[i, 1]
        theirs = stats.permutation_test((d,), np.mean, permutation_type="samples", n_resamples=9999, vectorized=True, rng=rng)
        assert p[i] == pytest.approx(randomization_test(*pairs[i])) == pytest.approx(theirs.pvalue, abs=0.02)


def test_a_further_run_is_where_it_is_predicted():
    rng = np.random.default_rng(1)
    earlier, new = rng.normal(size=(4000, 3)), rng.normal(size=4000)
    inside = [low <= x <= high for x, e in zip(new, earlier, strict=True)
              for low, high in [prediction_interval(e.mean(), e.std(ddof=1), 3, 0.95)]]  # fmt: skip
    assert np.mean(inside) == pytest.approx(0.95, abs=0.012)
