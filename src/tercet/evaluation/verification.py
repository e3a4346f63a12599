"""Accepting pairs by distance: VAL and FAR at every threshold (FaceNet, Schroff et al. 2015, arXiv:1503.03832, sec. 4)."""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch
from scipy.stats import binomtest

from tercet.errors import InputError, refuse_damaged, require
from tercet.evaluation import inputs
from tercet.evaluation.inputs import Bools, Floats, Ints, encode_unit
from tercet.images import SUFFIXES, PixelFormat, UnreadableImage
from tercet.messages import warn_once
from tercet.paths import locate, locate_inside, visible_files
from tercet.types import EncodeFunction

FAR = 1e-3  # of the paper's tables 3 to 6
PAIR_COLUMNS = ("fold", "same", "identity1", "image1", "identity2", "image2")
PAIRS_ACCEPTED = f"LFW's pairs.txt, or a .parquet, .csv, .tsv or .jsonl file with the columns {', '.join(PAIR_COLUMNS)}"
TRUTH = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}  # 1 == True
FACE_COLUMNS = ("identity", "image_no", "image")
FACES_ACCEPTED = f"a .parquet file with the columns {', '.join(FACE_COLUMNS)}, or a folder with Name/Name_0001.jpg"
PROBE = PixelFormat(size=16, channels=1, mean=(0.0,), std=(1.0,))  # JPEG decodes fastest to a small size
MOST = 10**9  # of the numbers of folds and images
Face = tuple[str, int]  # a person and the number of the image, from 1
Row = tuple[int, bool, Face, Face]  # fold, same, and the two images


@dataclass(frozen=True)
class FacePairs:
    """P pairs: ``fold (P,)``, ``same (P,)``, and the indices ``first``, ``second (P,)`` of their images in ``faces``."""

    fold: Ints
    same: Bools
    first: Ints
    second: Ints
    faces: Sequence[Face]

    @staticmethod
    def from_rows(rows: Sequence[Row]) -> "FacePairs":
        """Collect the images, each once, in the order of the pairs."""
        faces = list(dict.fromkeys(face for _, _, *both in rows for face in both))
        index = {face: i for i, face in enumerate(faces)}
        columns = zip(*((fold, same, index[one], index[other]) for fold, same, one, other in rows), strict=True)
        fold, same, first, second = map(np.array, columns)
        return FacePairs(fold, same, first, second, faces)


@dataclass(frozen=True)
class Roc:
    """The curve of ``far``, ``val (m + 1,)``: first at a threshold that accepts nothing, then at the m distinct distances t.

    VAL(t) and FAR(t) are the shares of same and of different pairs with d <= t (equations 5 to 7). In float64: torchmetrics'
    binary_roc is 4e-8 off at 6,000 pairs.
    """

    far: Floats
    val: Floats
    same: int
    different: int

    @staticmethod
    def from_distances(distance: Floats, same: Bools) -> "Roc":
        """Accumulate distances ``(P,)`` of pairs of both kinds, ``same (P,)``."""
        _, inverse = np.unique(distance, return_inverse=True)
        true, false = (np.bincount(inverse, weights=kind).cumsum() for kind in (same, ~same))
        return Roc(np.append(0.0, false / false[-1]), np.append(0.0, true / true[-1]), int(true[-1]), int(false[-1]))

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


def middle_of_best(edges: Floats, score: npt.NDArray[Any]) -> float:
    """The best threshold: the middle of an interval between ``edges (m,)``, which rise and end 1 beyond the outermost.

    ``score (m + 1,)`` is the quality of a cut in each interval. Of equally good ones the median (the lower of two) is taken.
    """
    best = np.flatnonzero(score == score.max())
    cut = best[(len(best) - 1) // 2]
    ends = np.concatenate([[edges[0] - 1], edges, [edges[-1] + 1]])
    return float((ends[cut] + ends[cut + 1]) / 2)


def accuracy_threshold(distance: Floats, same: Bools) -> float:
    """The t for which ``(d <= t) == same`` holds most often: ``(P,), (P,)``."""
    edges, inverse = np.unique(distance, return_inverse=True)
    gain = np.bincount(inverse, weights=np.where(same, 1.0, -1.0))
    return middle_of_best(edges, np.append(0.0, np.cumsum(gain)))


def fold_thresholds(pairs: FacePairs, distance: Floats) -> Floats:
    """The threshold of each pair's fold ``(P,)``, chosen on the other folds."""
    folds, inverse = np.unique(pairs.fold, return_inverse=True)
    others = [pairs.fold != fold for fold in folds]
    return np.array([accuracy_threshold(distance[other], pairs.same[other]) for other in others])[inverse]


def verification_metrics(pairs: FacePairs, distance: Floats, threshold: Floats) -> dict[str, float]:
    """The metrics of distances and thresholds ``(P,)``; a pair is accepted when d <= t, as in the paper."""
    masks = [pairs.fold == fold for fold in np.unique(pairs.fold)]
    correct = np.equal(distance <= threshold, pairs.same)
    accuracy = np.array([correct[mask].mean() for mask in masks])
    roc = Roc.from_distances(distance, pairs.same)
    val, far = roc.val_at(FAR)
    low, high = binomtest(round(val * roc.same), roc.same).proportion_ci(method="wilson")  # as if pairs were independent
    metrics = {"accuracy": float(accuracy.mean())}
    if len(accuracy) > 2:  # of two folds it is half their difference, 0 where they happen to agree
        metrics["accuracy_sem"] = float(accuracy.std(ddof=1) / np.sqrt(len(accuracy)))
    metrics |= {"threshold": float(np.mean([threshold[mask][0] for mask in masks])), "auc": roc.auc(), "eer": roc.eer()}
    return metrics | {"val@far1e-3": val, "val@far1e-3_low": float(low), "val@far1e-3_high": float(high), "far": far}


@dataclass(frozen=True)
class Verification:
    r"""The LFW protocol: the threshold of a fold is the best on the other folds; accuracy is the mean over folds.

    ``path`` holds the faces: a parquet table (identity, image_no, image) or a folder (Name/Name_0001.jpg). ``pairs`` is
    LFW's pairs.txt or a table (fold, same, identity1, image1, identity2, image2); ``folds`` names the folds to use, 2 or more.

    ``verification/<name>/...``: ``accuracy`` and, of 3 folds or more, its standard error over folds ``accuracy_sem``; the mean
    ``threshold``; over the pairs of all folds together ``auc``, ``eer`` and ``val@far1e-3``, VAL at the largest threshold with
    a FAR of 1e-3 at most, with Wilson's 95 % interval ``_low``, ``_high`` for independent pairs; and ``far``, the FAR there.

    >>> import io, tempfile
    >>> from PIL import Image
    >>> folder = Path(tempfile.mkdtemp())
    >>> for name, number, shade in [("Ann", 1, 0), ("Ann", 2, 1), ("Bo", 1, 180), ("Cy", 1, 10), ("Cy", 2, 11), ("Di", 1, 190)]:
    ...     (folder / name).mkdir(exist_ok=True)
    ...     Image.new("L", (16, 16), shade).save(folder / name / f"{name}_000{number}.png")
    >>> _ = (folder / "pairs.txt").write_text("2 1\nAnn 1 2\nAnn 1 Bo 1\nCy 1 2\nCy 1 Di 1")
    >>> encode = lambda images: np.array([[np.asarray(Image.open(io.BytesIO(x))).mean(), 99] for x in images])
    >>> Verification(folder, folder / "pairs.txt")(encode)["verification/lfw/accuracy"]
    1.0
    """

    path: str | Path
    pairs: str | Path
    folds: Sequence[int] | None = None
    name: str = "lfw"
    smaller_is_better: ClassVar[frozenset[str]] = frozenset({"eer", "far"})

    def __post_init__(self) -> None:
        inputs.check_source("verification", self.name, self.path)
        self._locate()
        folds = self.folds
        if folds is not None and (any(type(f) is not int for f in folds) or not 1 < len(set(folds)) == len(folds)):
            raise InputError(f"`folds`={folds}: a list of 2 folds or more without repetitions, as [7, 8]; by default all.")

    def _locate(self) -> tuple[Path, Path]:
        """The faces, a file or a folder, and the file of pairs."""
        faces = locate(str(self.path))
        faces = faces if faces.is_dir() else inputs.find_input(self.path, "path", FACES_ACCEPTED, (".parquet",))
        return faces, inputs.find_input(self.pairs, "pairs", PAIRS_ACCEPTED, (".txt", *inputs.TABLES))

    @cached_property
    def protocol(self) -> FacePairs:
        """The pairs of the chosen folds, checked, read at first use."""
        file, where = self._locate()[1], f"`pairs`={self.pairs}"
        if file.suffix.lower() == ".txt":
            cells = _lfw_cells(file, where)
        else:
            cells = zip(*inputs.read_table(self.pairs, "pairs", PAIR_COLUMNS, PAIRS_ACCEPTED).values(), strict=True)
        rows = [_row(row, f"{where}, pair {number}") for number, row in enumerate(cells, start=1)]
        require(rows, f"{where} has no pairs.")
        available = sorted({row[0] for row in rows})
        chosen = available if self.folds is None else sorted(self.folds)
        if lacking := sorted(set(chosen) - set(available)):
            raise InputError(f"`folds`={chosen}: {where} has the folds {available}, not {lacking}.")
        why = "a fold's threshold is chosen on the other folds, so 2 are needed (without `folds` all are taken)"
        require(len(chosen) > 1, f"{where} has the folds {available}: {why}.")
        rows = [row for row in rows if row[0] in chosen]
        kinds = {(row[0], row[1]) for row in rows}
        if poor := [fold for fold in chosen if not {(fold, True), (fold, False)} <= kinds]:
            raise InputError(f"{where}: fold {poor[0]} needs pairs of both kinds, same and different people.")
        return FacePairs.from_rows(rows)

    @cached_property
    def images(self) -> list[bytes]:
        """The content of each image of the pairs, in the order of ``protocol.faces``, read at first use."""
        place, faces = self._locate()[0], self.protocol.faces
        found = _read_folder(place, faces) if place.is_dir() else _read_images(place, self.path, set(faces))
        if missing := [face for face in faces if face not in found]:
            raise self._bad_image(missing[0], f", and {len(missing) - 1} more are missing" if missing[1:] else " is missing")
        try:
            for face in faces:
                PROBE.open(found[face])
        except UnreadableImage as error:
            raise self._bad_image(face, f" is unreadable: {error}") from error
        return [found[face] for face in faces]

    def _bad_image(self, face: Face, fault: str) -> InputError:
        pairs, index = self.protocol, self.protocol.faces.index(face)
        folds = ", ".join(map(str, np.unique(pairs.fold[(pairs.first == index) | (pairs.second == index)])))
        advice = "No pair is skipped: complete the images, or leave the fold out with `folds`."
        return InputError(f"`path`={self.path}: image {face[1]} of {face[0]} (fold {folds}){fault}. {advice}")

    def distances(self, encode: EncodeFunction) -> Floats:
        """The squared L2 distance of each pair on the unit sphere ``(P,)``, encoding each image once."""
        z = encode_unit(encode, self.images, f"verification of {self.name}")
        first, second = torch.from_numpy(self.protocol.first), torch.from_numpy(self.protocol.second)
        distance = (2 - 2 * (z[first] * z[second]).sum(1)).clamp(0, 4)
        return np.asarray(distance.round(decimals=12))  # far below float32, so that equal pairs tie on every machine

    def __call__(self, encode: EncodeFunction) -> dict[str, float]:
        """Measure, with one call of ``encode``."""
        if (different := int((~self.protocol.same).sum())) < 1 / FAR:
            few = f"{different} different pairs cannot show a FAR of {FAR:g}; val@far1e-3 is VAL without any false accept"
            warn_once(f"verification of {self.name}: {few}. More folds help.")
        distance = self.distances(encode)
        metrics = verification_metrics(self.protocol, distance, fold_thresholds(self.protocol, distance))
        return {f"verification/{self.name}/{metric}": value for metric, value in metrics.items()}

    def examples(self, encode: EncodeFunction) -> dict[str, Floats]:
        """Whether each pair is judged right by the threshold of its fold, ``(P,)``; scaled where folds have unequal sizes."""
        pairs, distance = self.protocol, self.distances(encode)
        right = np.equal(distance <= fold_thresholds(pairs, distance), pairs.same)
        values = inputs.join_parts([right[pairs.fold == fold] for fold in np.unique(pairs.fold)])
        return {f"verification/{self.name}/accuracy": values}

    def figures(self, encode: EncodeFunction) -> dict[str, Any]:
        """Draw ``roc``, ``distances``, and ``errors``, the images that are misjudged by the largest margin."""
        from tercet.evaluation.figures import plot_distances, plot_errors, plot_roc  # needs matplotlib

        pairs, distance = self.protocol, self.distances(encode)
        threshold = fold_thresholds(pairs, distance)
        mean = verification_metrics(pairs, distance, threshold)["threshold"]
        excess = np.where((distance <= threshold) == pairs.same, 0.0, np.abs(distance - threshold))
        drawn = {"roc": plot_roc(Roc.from_distances(distance, pairs.same), FAR)}
        drawn["distances"] = plot_distances(distance, pairs.same, mean)
        return drawn | {"errors": plot_errors(pairs, self.images, distance, excess)}


def _lfw_cells(file: Path, where: str) -> Iterable[Sequence[Any]]:
    """LFW's format: first the numbers of folds (or one) and of pairs of a kind in each; per fold same, then different."""
    from tercet.data.file_formats import read_lines  # imports datasets: a second

    header, *lines = [line.split() for line in read_lines(file, where) if line.strip()] or [[]]
    if len(header) not in (1, 2) or not all(re.fullmatch("[1-9][0-9]{0,8}", word) for word in header):
        expected = "LFW's pairs.txt begins with the numbers of folds and of pairs of a kind in each (10 300), or the second"
        raise InputError(f"{where}: the first line is {' '.join(header)!r}. {expected}.")
    folds, count = map(int, ["1", *header][-2:])
    if len(lines) != 2 * folds * count:
        raise InputError(f"{where} has {len(lines)} pairs; its first line promises {folds} x 2 x {count}.")
    for i, words in enumerate(lines):
        same = i // count % 2 == 0
        if len(words) != (3 if same else 4):
            form = "a same pair, 'name n1 n2'" if same else "a different pair, 'name1 n1 name2 n2'"
            raise InputError(f"{where}, pair {i + 1}: {' '.join(words)!r}, where {form}, is expected.")
        yield i // (2 * count) + 1, same, *words[:2], words[0 if same else 2], words[-1]


def _row(row: Sequence[Any], where: str) -> Row:
    fold, same, one, image1, other, image2 = row
    truth = TRUTH.get(same.strip().lower() if isinstance(same, str) else same)
    try:
        if truth is None or not str(one or "").strip() or not str(other or "").strip():
            raise ValueError
        number, first, second = int(fold), (str(one), int(image1)), (str(other), int(image2))
        if max(map(abs, (number, first[1], second[1]))) > MOST:
            raise OverflowError
    except (TypeError, ValueError, OverflowError):
        cells = ", ".join(f"{name}={cell!r:.40}" for name, cell in zip(PAIR_COLUMNS, row, strict=True))
        expected = "Folds and images are whole numbers, same is true or false, identities are names"
        raise InputError(f"{where}: {cells}. {expected}.") from None
    if first == second or truth != (first[0] == second[0]):
        what = "an image with itself" if first == second else f"{one} and {other} as same={str(truth).lower()}"
        raise InputError(f"{where}: it compares {what}. Correct the file.")
    return number, truth, first, second


def _read_folder(root: Path, faces: Sequence[Face]) -> dict[Face, bytes]:
    """Files ``Name/Name_0001.jpg`` at any depth; the first of ``SUFFIXES`` counts where there are files of several."""
    wanted = {(name, f"{name}_{number:04d}"): (name, number) for name, number in faces}
    found: dict[Face, Path] = {}
    files = [file for file in visible_files(root) if file.suffix.lower() in SUFFIXES]
    for file in sorted(files, key=lambda file: SUFFIXES.index(file.suffix.lower())):
        if (face := wanted.get((file.parent.name, file.stem))) is not None:
            other = found.setdefault(face, file)
            twice = f"`path`={root} has image {face[1]} of {face[0]} twice, in {other.parent} and {file.parent}. Remove one."
            require(other.parent == file.parent, twice)
    cells = {face: {"bytes": None, "path": file} for face, file in found.items()}
    return {face: inputs.read_image(cell, f"`path`={root}: {cell['path']}") for face, cell in cells.items()}


def _read_images(file: Path, path: str | Path, wanted: set[Face]) -> dict[Face, bytes]:
    """Only the rows of the people that the pairs name are held in memory."""
    found: dict[Face, bytes] = {}
    with refuse_damaged(f"`path`={path}"):
        inputs.check_columns(pq.read_schema(file).names, path, "path", FACE_COLUMNS, FACES_ACCEPTED)
        table = pq.read_table(file, columns=list(FACE_COLUMNS), filters=[("identity", "in", {name for name, _ in wanted})])
        table.validate(full=True)
        rows = zip(*(table[column].to_pylist() for column in FACE_COLUMNS), strict=True)
    for name, number, cell in rows:
        require(isinstance(number, int | float), f"`path`={path}: image_no={number!r:.40} of {name}: a whole number is needed.")
        if (name, number) in wanted and cell is not None:
            require((name, number) not in found, f"`path`={path} has image {number} of {name} twice. Correct it.")
            cell = cell if isinstance(cell, dict) else {"bytes": cell, "path": None}
            where = f"`path`={path}: image {number} of {name}"
            if cell.get("bytes") is None and cell.get("path") is not None:
                cell = {"bytes": None, "path": locate_inside(str(cell["path"]), [os.path.realpath(file.parent)])}
                require(cell["path"] is not None, f"{where} is outside of {file.parent}. Copy it there.")
            found[name, number] = inputs.read_image(cell, where)
    return found
