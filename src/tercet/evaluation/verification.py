"""Accepting pairs by distance: VAL and FAR at every threshold (FaceNet, Schroff et al. 2015, arXiv:1503.03832, sec. 4)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from tercet.errors import InputError
from tercet.evaluation import figures
from tercet.evaluation.face_data import FacePairs, find_faces, find_pairs_file, read_face_pairs, read_faces
from tercet.evaluation.inputs import check_name, encode_unit
from tercet.messages import warn_once
from tercet.types import EncodeFunction

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Floats = npt.NDArray[np.float64]
Z95 = 1.959963984540054  # the normal distribution's 97.5 % point
FAR = 1e-3  # of the paper's tables 3 to 6


@dataclass(frozen=True)
class Roc:
    """The curve of ``far``, ``val (m + 1,)``: first at a threshold that accepts nothing, then at the m distinct distances t.

    A pair is accepted when d <= t. VAL(t) = |TA(t)| / |P_same|, FAR(t) = |FA(t)| / |P_diff| (equations 5 to 7).
    torchmetrics' binary_roc computes in float32: 4e-8 off at 6,000 pairs.
    """

    far: Floats
    val: Floats
    same: int
    different: int

    @staticmethod
    def from_distances(distance: Floats, same: npt.NDArray[np.bool_]) -> "Roc":
        """``(P,), (P,)``; there are pairs of both kinds."""
        edges, inverse = np.unique(distance, return_inverse=True)
        true = np.bincount(inverse, weights=same, minlength=len(edges)).cumsum()
        false = np.bincount(inverse, weights=~same, minlength=len(edges)).cumsum()
        start = np.zeros(1)
        return Roc(np.append(start, false / false[-1]), np.append(start, true / true[-1]), int(true[-1]), int(false[-1]))

    def auc(self) -> float:
        """The probability that a same pair is nearer than a different one, ties counting half."""
        return float(np.trapezoid(self.val, self.far))

    def eer(self) -> float:
        """FAR where FAR = 1 - VAL, on the straight line between the thresholds around it."""
        gap = self.far + self.val - 1
        i = int(np.argmax(gap >= 0))  # gap rises from -1 to 1, so that i >= 1
        share = -gap[i - 1] / (gap[i] - gap[i - 1])
        return float(self.far[i - 1] + share * (self.far[i] - self.far[i - 1]))

    def val_at(self, far: float) -> tuple[float, float]:
        """VAL at the largest threshold whose FAR is at most ``far``, and its FAR, without interpolation."""
        i = int(np.flatnonzero(self.far <= far)[-1])
        return float(self.val[i]), float(self.far[i])


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a proportion of ``count`` independent trials (Wilson 1927)."""
    spread = Z95**2 / count
    middle = (share + spread / 2) / (1 + spread)
    half = Z95 / (1 + spread) * np.sqrt(share * (1 - share) / count + spread / (4 * count))
    return float(max(0.0, middle - half)), float(min(1.0, middle + half))


def middle_of_best(edges: Floats, score: npt.NDArray[Any]) -> float:
    """The threshold of the best cut, exactly, without a grid.

    Only the m distinct, rising ``edges (m,)`` matter; ``score (m + 1,)`` is the quality of a cut below the first, from the
    first to before the second, and so on. Of equally good cuts the median one (the lower of two) is taken, and of its interval
    the middle; the outermost intervals end 1 beyond the edges.
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


def fold_thresholds(pairs: FacePairs, distance: Floats) -> Floats:
    """``(P,)``: the threshold of each pair's fold, chosen on the other folds, for distances ``(P,)``."""
    threshold = np.empty_like(distance)
    for fold in np.unique(pairs.fold):
        own = pairs.fold == fold
        threshold[own] = accuracy_threshold(distance[~own], pairs.same[~own])
    return threshold


def verification_metrics(pairs: FacePairs, distance: Floats, threshold: Floats) -> dict[str, float]:
    """The metrics of distances and thresholds ``(P,)``; a pair is accepted when d <= t, as in the paper."""
    masks = [pairs.fold == fold for fold in np.unique(pairs.fold)]
    correct = np.equal(distance <= threshold, pairs.same)
    accuracy = np.array([correct[mask].mean() for mask in masks])
    roc = Roc.from_distances(distance, pairs.same)
    val, far = roc.val_at(FAR)
    low, high = wilson_interval(val, roc.same)
    return {
        "accuracy": float(accuracy.mean()),
        "accuracy_sem": float(accuracy.std(ddof=1) / np.sqrt(len(accuracy))),
        "threshold": float(np.mean([threshold[mask][0] for mask in masks])),
        "auc": roc.auc(),
        "eer": roc.eer(),
        "val@far1e-3": val,
        "val@far1e-3_low": low,
        "val@far1e-3_high": high,
        "far": far,
    }


@dataclass(frozen=True)
class Verification:
    r"""The LFW protocol: the threshold of a fold is the best on the other folds; accuracy is the mean over folds.

    ``path`` holds the faces: a parquet table (identity, image_no, image) or a folder (Name/Name_0001.jpg). ``pairs`` is
    LFW's pairs.txt or a table (fold, same, identity1, image1, identity2, image2), which names the folds. ``folds`` names those
    to use, 2 at least; by default all. An image that is missing or unreadable is an error.

    ``verification/<name>/...``: ``accuracy`` with its standard error over folds ``accuracy_sem``, the mean ``threshold``;
    over the pairs of all folds together ``auc``, ``eer`` and ``val@far1e-3``, VAL at the largest threshold with a FAR of
    1e-3 at most, and ``far``, its FAR. A fold of 300 different pairs resolves FAR in steps of 1/300 only, so the negatives are
    pooled, and this threshold is not a held-out one. ``_low`` and ``_high`` are Wilson's 95 % interval for the same pairs at
    this threshold: pairs are taken as independent, and the threshold (which rests on few pairs) as given.

    >>> import io, tempfile
    >>> from PIL import Image
    >>> folder = Path(tempfile.mkdtemp())
    >>> for name, shade in {"Ann": 0, "Bo": 180, "Cy": 10, "Di": 190}.items():
    ...     (folder / name).mkdir()
    ...     for number in (1, 2):
    ...         Image.new("L", (16, 16), shade + number).save(folder / name / f"{name}_000{number}.png")
    >>> _ = (folder / "pairs.txt").write_text("2 1\nAnn 1 2\nAnn 1 Bo 1\nCy 1 2\nCy 1 Di 1")
    >>> def encode(images):
    ...     return np.array([[np.asarray(Image.open(io.BytesIO(image))).mean(), 99] for image in images])
    >>> Verification(folder, folder / "pairs.txt")(encode)["verification/lfw/accuracy"]
    1.0
    """

    path: str | Path
    pairs: str | Path
    folds: Sequence[int] | None = None
    name: str = "lfw"

    def __post_init__(self) -> None:
        check_name("verification", self.name)
        find_faces(self.path)
        find_pairs_file(self.pairs)
        folds = self.folds
        if folds is not None and (any(type(f) is not int for f in folds) or not 1 < len(set(folds)) == len(folds)):
            raise InputError(f"`folds`={folds}: a list of 2 folds or more without repetitions, as [7, 8]; by default all.")

    @cached_property
    def protocol(self) -> FacePairs:
        """The pairs of the chosen folds, read at first use."""
        return read_face_pairs(self.pairs, self.folds)

    @cached_property
    def images(self) -> list[bytes]:
        """The content of each image that a pair needs, once, read at first use."""
        return read_faces(self.path, self.protocol)

    def distances(self, encode: EncodeFunction) -> Floats:
        """The squared L2 distance of each pair on the unit sphere ``(P,)``, encoding each image once."""
        z = encode_unit(encode, self.images, f"verification of {self.name}")
        first, second = (torch.from_numpy(side) for side in (self.protocol.first, self.protocol.second))
        # Rounded far below float32, so that equal pairs tie on every machine.
        distance: Floats = (2 - 2 * (z[first] * z[second]).sum(1)).clamp(0, 4).round(decimals=12).numpy()
        return distance

    def __call__(self, encode: EncodeFunction) -> dict[str, float]:
        """Measure."""
        if (different := int((~self.protocol.same).sum())) < 1 / FAR:
            warn_once(
                f"verification of {self.name}: {different} different pairs cannot show a FAR of {FAR:g}; val@far1e-3 is VAL "
                "without any false accept. More folds help."
            )
        distance = self.distances(encode)
        metrics = verification_metrics(self.protocol, distance, fold_thresholds(self.protocol, distance))
        return {f"verification/{self.name}/{metric}": value for metric, value in metrics.items()}

    def figures(self, encode: EncodeFunction) -> "dict[str, Figure]":
        """Draw ``roc``, ``distances``, and ``errors``, the images that are misjudged by the largest margin."""
        pairs, distance = self.protocol, self.distances(encode)
        threshold = fold_thresholds(pairs, distance)
        mean = verification_metrics(pairs, distance, threshold)["threshold"]
        excess = np.where((distance <= threshold) == pairs.same, 0.0, np.abs(distance - threshold))
        return {
            "roc": figures.plot_roc(Roc.from_distances(distance, pairs.same), FAR),
            "distances": figures.plot_distances(distance, pairs.same, mean),
            "errors": figures.plot_errors(pairs, self.images, distance, excess),
        }
