"""How well scores follow a gold standard."""

import numpy as np
import numpy.typing as npt
from scipy.stats import pearsonr, spearmanr

Floats = npt.NDArray[np.float64]


def correlations(scores: Floats, gold: Floats, subset: npt.NDArray[np.str_] | None) -> dict[str, float]:
    """Spearman's and Pearson's correlation, each in the three ways that papers report (SimCSE, arXiv:2104.08821, B).

    ``_all`` is one correlation over all pairs, ``_mean`` the mean over subsets, ``_wmean`` that weighted by their
    sizes; without ``subset`` there is only ``_all``. Shapes ``(N,)``; ``gold`` must vary in each subset.
    """
    found = {}
    for name, measure in (("spearman", spearmanr), ("pearson", pearsonr)):
        found[f"{name}_all"] = _correlation(measure, scores, gold)
        if subset is not None:
            names, sizes = np.unique(subset, return_counts=True)
            parts = [_correlation(measure, scores[subset == s], gold[subset == s]) for s in names]
            found[f"{name}_mean"] = float(np.mean(parts))
            found[f"{name}_wmean"] = float(np.average(parts, weights=sizes))
    return found


def _correlation(measure: object, scores: Floats, gold: Floats) -> float:
    """0 for constant scores: a collapsed model ranks nothing, and a NaN would neither compare nor be valid JSON."""
    if np.ptp(scores) == 0:
        return 0.0
    assert callable(measure)
    return float(measure(scores, gold).statistic)
