"""Choosing where to cut."""

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def middle_of_best(edges: Floats, score: npt.NDArray[Any]) -> float:
    """The threshold of the best cut, exact: no grid.

    Something changes at the m distinct, rising ``edges (m,)`` only; ``score (m + 1,)`` is how good it is below the first,
    from the first to before the second, and so on. Of equally good cuts the median one (the lower of two) is taken, and
    of its interval the middle; the outermost intervals end 1 beyond the edges.
    """
    best = np.flatnonzero(score == score.max())
    cut = best[(len(best) - 1) // 2]
    ends = np.concatenate([[edges[0] - 1], edges, [edges[-1] + 1]])
    return float((ends[cut] + ends[cut + 1]) / 2)


def accuracy_threshold(distance: Floats, same: npt.NDArray[np.bool_]) -> float:
    """The t for which ``(d <= t) == same`` holds most often: ``(P,), (P,)``."""
    edges, inverse = np.unique(distance, return_inverse=True)
    gain = np.bincount(inverse, weights=np.where(same, 1.0, -1.0), minlength=len(edges))
    return middle_of_best(edges, np.concatenate([[0.0], np.cumsum(gain)]))
