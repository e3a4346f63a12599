"""Accepting pairs by distance: VAL and FAR at every threshold (FaceNet, Schroff et al. 2015, arXiv:1503.03832, sec. 4)."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Z95 = 1.959963984540054  # the normal distribution's 97.5 % point


@dataclass(frozen=True)
class Roc:
    """At the m distinct distances as thresholds t, and first at one that accepts nothing: ``far``, ``val (m + 1,)``.

    A pair is accepted when d <= t. VAL(t) = |TA(t)| / |P_same|, FAR(t) = |FA(t)| / |P_diff| (equations 5 to 7).
    """

    far: Floats
    val: Floats
    same: int
    different: int

    @staticmethod
    def of(distance: Floats, same: npt.NDArray[np.bool_]) -> "Roc":
        """``(P,), (P,)``; there are pairs of both kinds."""
        edges, inverse = np.unique(distance, return_inverse=True)
        true = np.bincount(inverse, weights=same, minlength=len(edges)).cumsum()
        false = np.bincount(inverse, weights=~same, minlength=len(edges)).cumsum()
        start = np.zeros(1)
        return Roc(
            np.append(start, false / false[-1]), np.append(start, true / true[-1]), int(true[-1]), int(false[-1])
        )

    def auc(self) -> float:
        """The chance that a same pair is nearer than a different one, ties counting half."""
        return float(np.trapezoid(self.val, self.far))

    def eer(self) -> float:
        """FAR where FAR = 1 - VAL, on the straight line between the thresholds around it."""
        gap = self.far + self.val - 1
        i = int(np.argmax(gap >= 0))  # gap rises from -1 to 1, so that i >= 1
        share = -gap[i - 1] / (gap[i] - gap[i - 1])
        return float(self.far[i - 1] + share * (self.far[i] - self.far[i - 1]))

    def val_at(self, far: float) -> tuple[float, float]:
        """VAL at the largest threshold whose FAR is at most ``far``, and the FAR that it has: nothing is interpolated."""
        i = int(np.flatnonzero(self.far <= far)[-1])
        return float(self.val[i]), float(self.far[i])


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a proportion of ``count`` independent trials (Wilson 1927)."""
    spread = Z95**2 / count
    middle = (share + spread / 2) / (1 + spread)
    half = Z95 / (1 + spread) * np.sqrt(share * (1 - share) / count + spread / (4 * count))
    return float(max(0.0, middle - half)), float(min(1.0, middle + half))
