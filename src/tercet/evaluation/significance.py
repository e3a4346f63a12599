"""Differences between two systems: over training seeds, and over the examples of a test set."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from tercet.messages import sample_sd

RESAMPLES = 9_999


class PairedDifference(NamedTuple):
    """A mean difference over n seeds, its 95 % t interval, the p values of the t test and of the sign test, and n."""

    mean: float
    low: float
    high: float
    p: float
    sign_p: float
    n: int


def paired_difference(differences: Sequence[float]) -> PairedDifference:
    """Compare two systems by their differences on n seeds, two or more.

    Student's t over the differences, two-sided: another run of both would differ so. The sign test (``scipy.stats.binomtest``)
    assumes no distribution, and cannot be below 2^(1 - n): 0.25 for three seeds, 0.0625 for five. Of a difference that is
    infinite or NaN the t test says nothing: its p is 1, its interval NaN.

    >>> found = paired_difference([0.1, 0.2, 0.3])
    >>> [round(x, 3) for x in found]
    [0.2, -0.048, 0.448, 0.074, 0.25, 3]
    """
    d = np.asarray(differences, np.float64)
    mean, n = float(d.mean()), len(d)
    error = sample_sd(d.tolist()) / n**0.5
    margin = float(stats.t.ppf(0.975, n - 1)) * error
    same = math.inf if abs(mean) > 1e-12 else 0.0  # where all seeds have one difference, up to rounding
    t = abs(mean) / error if error > 1e-12 * abs(mean) else same
    p = 2 * float(stats.t.sf(t, n - 1)) if math.isfinite(mean) else 1.0
    above, apart = int((d > 0).sum()), int((d != 0).sum())
    sign_p = float(stats.binomtest(above, apart).pvalue) if apart else 1.0
    return PairedDifference(mean, mean - margin, mean + margin, p, sign_p, n)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p values of several tests (Holm 1979): at a level of 0.05 any false rejection among them has at most that chance.

    >>> [round(p, 2) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p, kind="stable")
    steps = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(steps, 1.0)
    return [float(x) for x in adjusted]


def randomization_test(first: Any, second: Any, seed: int = 0) -> float:
    """The p value of paired approximate randomization over N examples, two-sided: ``(N,), (N,)``, whose means are compared.

    In each of ``RESAMPLES`` resamples the two values of a random half of the examples change places (Noreen 1989; Yeh 2000).
    It asks whether other examples of the same kind would give the same order of these trained models; about other seeds it
    says nothing.

    >>> randomization_test([1, 1, 1, 0, 1, 1], [0, 0, 1, 0, 0, 0]) < 0.15
    True
    """
    return randomization_tests(np.subtract(first, second, dtype=np.float64)[None], seed)[0]


def randomization_tests(differences: Any, seed: int = 0) -> list[float]:
    """``randomization_test`` of P pairs of systems, by their differences on the same N examples: ``(P, N)``.

    All take the same exchanges, so that many pairs cost little more than one; ``holm`` corrects for their number. With fewer
    than 2^N = ``RESAMPLES`` exchanges each is made once, and the p values are exact.
    """
    d = np.asarray(differences, np.float64)
    number, examples = d.shape
    seen, least = np.abs(d.sum(1)), 1e-12 * np.abs(d).sum(1)
    exact = 2**examples <= RESAMPLES if examples < 64 else False
    total = 2**examples if exact else RESAMPLES
    rng, extreme = np.random.default_rng(seed), np.zeros(number)
    for start in range(0, total, step := max(1, 2_000_000 // examples)):
        rows = np.arange(start, min(start + step, total))
        bits = rows[:, None] >> np.arange(examples) & 1 if exact else rng.integers(0, 2, (len(rows), examples), np.int8)
        extreme += (np.abs((2.0 * bits - 1) @ d.T) >= seen - least).sum(0)
    p = extreme / total if exact else (extreme + 1) / (total + 1)
    return [float(x) for x in p]


def prediction_interval(mean: float, sd: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """Where one more observation is to be expected, given the mean and standard deviation of n (two or more) earlier ones.

    ``mean ± t sd sqrt(1 + 1/n)``, with Student's t of n - 1 degrees of freedom (Geisser 1993, section 2.2).

    >>> [round(x, 3) for x in prediction_interval(0.5, 0.01, 3)]
    [0.45, 0.55]
    """
    margin = float(stats.t.ppf((1 + level) / 2, n - 1)) * sd * (1 + 1 / n) ** 0.5
    return mean - margin, mean + margin
