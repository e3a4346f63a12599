"""Accepting pairs by distance: VAL and FAR at every threshold (FaceNet, Schroff et al. 2015, arXiv:1503.03832, sec. 4)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from tercet.errors import InputError
from tercet.evaluation import figures
from tercet.evaluation.face_data import FacePairs, faces_place, pairs_file, read_face_pairs, read_faces
from tercet.evaluation.inputs import check_name, encode_unit
from tercet.messages import warn_once
from tercet.types import EncodeFunction

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
        return Roc(np.append(start, false / false[-1]), np.append(start, true / true[-1]), int(true[-1]), int(false[-1]))

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


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a proportion of ``count`` independent trials (Wilson 1927)."""
    spread = Z95**2 / count
    middle = (share + spread / 2) / (1 + spread)
    half = Z95 / (1 + spread) * np.sqrt(share * (1 - share) / count + spread / (4 * count))
    return float(max(0.0, middle - half)), float(min(1.0, middle + half))


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


FAR = 1e-3  # of the paper's tables 3 to 6


@dataclass(frozen=True)
class ScoredPairs:
    """What a model makes of the pairs: ``distance (P,)`` is squared L2 on the unit sphere, 2 - 2 cos, from 0 to 4.

    ``threshold (P,)`` is that of the pair's fold, chosen on the other folds.
    """

    pairs: FacePairs
    distance: Floats
    threshold: Floats

    @staticmethod
    def of(pairs: FacePairs, distance: Floats) -> "ScoredPairs":
        """Chooses the thresholds."""
        threshold = np.empty_like(distance)
        for fold in np.unique(pairs.fold):
            own = pairs.fold == fold
            threshold[own] = accuracy_threshold(distance[~own], pairs.same[~own])
        return ScoredPairs(pairs, distance, threshold)

    @property
    def right(self) -> npt.NDArray[np.bool_]:
        """``(P,)``: is the pair judged rightly? It is accepted when d <= t, as in the paper."""
        return np.equal(self.distance <= self.threshold, self.pairs.same)

    def roc(self) -> Roc:
        """Over the pairs of all folds together."""
        return Roc.of(self.distance, self.pairs.same)

    def metrics(self) -> dict[str, float]:
        """By their last names."""
        masks = [self.pairs.fold == fold for fold in np.unique(self.pairs.fold)]
        accuracy = np.array([self.right[mask].mean() for mask in masks])
        roc = self.roc()
        val, far = roc.val_at(FAR)
        low, high = wilson_interval(val, roc.same)
        return {
            "accuracy": float(accuracy.mean()),
            "accuracy_sem": float(accuracy.std(ddof=1) / np.sqrt(len(accuracy))),
            "threshold": float(np.mean([self.threshold[mask][0] for mask in masks])),
            "auc": roc.auc(),
            "eer": roc.eer(),
            "val@far1e-3": val,
            "val@far1e-3_low": low,
            "val@far1e-3_high": high,
            "far": far,
        }


@dataclass(frozen=True)
class Verification:
    """The LFW protocol: the threshold of a fold is the best on the other folds; accuracy is the mean over folds.

    ``path`` holds the faces: a parquet table (identity, image_no, image) or a folder (Name/Name_0001.jpg). ``pairs`` is
    LFW's pairs.txt or a table (fold, same, identity1, image1, identity2, image2); a fold is what the file says, never a
    cut of the list. ``folds`` names those to use, 2 at least; null is all. An image that is missing or unreadable is an
    error.

    ``verification/<name>/...``: ``accuracy`` with its standard error over folds ``accuracy_sem``, the mean ``threshold``;
    over the pairs of all folds together ``auc``, ``eer`` and ``val@far1e-3``, VAL at the largest threshold with a FAR of
    1e-3 at most, and ``far``, the FAR that it has: a fold of 300 different pairs knows FAR in steps of 1/300 only, so that
    the negatives are pooled and this threshold is no held-out one. ``_low`` and ``_high`` are Wilson's 95 % interval for
    the same pairs at this threshold: pairs are taken as independent, and the threshold (it rests on few pairs) as given.
    """

    name: str
    path: str
    pairs: str
    folds: Sequence[int] | None

    def __post_init__(self) -> None:
        check_name("verification", self.name)
        faces_place(self.path)
        pairs_file(self.pairs)
        folds = self.folds
        if folds is not None and (any(type(f) is not int for f in folds) or not 1 < len(set(folds)) == len(folds)):
            raise InputError(
                f"evaluation.folds={folds}: null, or a list of 2 folds or more without repetitions, as [7, 8]: there must be "
                "another fold to choose a fold's threshold on."
            )

    @cached_property
    def protocol(self) -> FacePairs:
        """The pairs of the chosen folds; read at the first use, once."""
        return read_face_pairs(self.pairs, self.folds)

    @cached_property
    def images(self) -> list[bytes]:
        """The content of each image that a pair needs, once."""
        return read_faces(self.path, self.protocol)

    def scored(self, encode: EncodeFunction) -> ScoredPairs:
        """Distances and thresholds, from one call of ``encode`` with each image once."""
        z = encode_unit(encode, self.images, f"verification of {self.name}")
        first, second = (torch.from_numpy(side) for side in (self.protocol.first, self.protocol.second))
        # Rounded far below float32, so that equal pairs tie on every machine.
        distance = (2 - 2 * (z[first] * z[second]).sum(1)).clamp(0, 4).round(decimals=12)
        return ScoredPairs.of(self.protocol, distance.numpy())

    def __call__(self, encode: EncodeFunction) -> dict[str, float]:
        """All metrics."""
        if (different := int((~self.protocol.same).sum())) < 1 / FAR:
            warn_once(
                f"verification of {self.name}: {different} different pairs cannot show a FAR of {FAR:g}; val@far1e-3 is VAL "
                "without any false accept. More evaluation.folds help."
            )
        found = self.scored(encode).metrics()
        return {f"verification/{self.name}/{metric}": value for metric, value in found.items()}

    def figures(self, encode: EncodeFunction) -> "dict[str, Figure]":
        """``roc``, ``distances``, and ``errors``: the images that are judged wrong by most."""
        scored = self.scored(encode)
        same, threshold = self.protocol.same, scored.metrics()["threshold"]
        excess = np.where(scored.right, 0.0, np.abs(scored.distance - scored.threshold))
        return {
            "roc": figures.roc(scored.roc(), FAR),
            "distances": figures.distances(scored.distance, same, threshold),
            "errors": figures.errors(self.protocol, self.images, scored.distance, excess),
        }
