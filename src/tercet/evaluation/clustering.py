"""How well a clustering agrees with labels. In float64: torchmetrics' AMI is off by 0.002 at 1,300 items, and takes 20 s."""

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.stats import hypergeom
from torch import Tensor

from tercet.errors import InputError
from tercet.evaluation.inputs import LabeledItems, check_source, encode_unit, read_labeled_items
from tercet.evaluation.verification import middle_of_best
from tercet.messages import warn_once
from tercet.types import EncodeFunction, Source

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Contingency:
    """J places where a cluster and a label meet: ``joint (J,)`` items, and the sizes ``cluster (J,)``, ``label (J,)`` of both.

    ``clusters`` and ``labels`` are the sizes of all, once each.
    """

    joint: Ints
    cluster: Ints
    label: Ints
    clusters: Ints
    labels: Ints

    @staticmethod
    def of(cluster: Ints, label: Ints) -> "Contingency":
        """``(N,), (N,)``: any whole numbers."""
        _, cluster, clusters = np.unique(cluster, return_inverse=True, return_counts=True)
        _, label, labels = np.unique(label, return_inverse=True, return_counts=True)
        cells, joint = np.unique(cluster * len(labels) + label, return_counts=True)
        return Contingency(joint, clusters[cells // len(labels)], labels[cells % len(labels)], clusters, labels)

    def bcubed(self) -> tuple[float, float, float]:
        """Precision, recall and their harmonic mean F (Bagga and Baldwin 1998; Amigó et al. 2009).

        Precision is the mean over items of the share of its cluster that has its label, itself included; recall that of
        its label that is in its cluster.
        """
        count, square = self.labels.sum(), self.joint.astype(np.float64) ** 2
        precision, recall = (square / self.cluster).sum() / count, (square / self.label).sum() / count
        return float(precision), float(recall), float(2 * precision * recall / (precision + recall))

    def nmi(self) -> float:
        """Mutual information over the mean of the two entropies; 0 where neither side tells anything apart."""
        mean = (_entropy(self.clusters) + _entropy(self.labels)) / 2
        return self._information() / mean if mean > 0 else 0.0

    def ami(self) -> float:
        """(MI - E) / (mean entropy - E), E being what chance gives with these sizes (Vinh et al. 2010).

        0 where chance leaves nothing to gain: one cluster, or one for each item.
        """
        expected = self._expected()
        room = (_entropy(self.clusters) + _entropy(self.labels)) / 2 - expected
        return (self._information() - expected) / room if room > 1e-9 else 0.0

    def _information(self) -> float:
        """Mutual information in nats."""
        count = self.labels.sum()
        ratio = self.joint * count / (self.cluster.astype(np.float64) * self.label)
        return float(max(0.0, (self.joint / count * np.log(ratio)).sum()))

    def _expected(self) -> float:
        """Over the distinct pairs of sizes: there are few, however many clusters there are."""
        count, total = int(self.labels.sum()), 0.0
        for a, times_a in zip(*np.unique(self.clusters, return_counts=True), strict=True):
            for b, times_b in zip(*np.unique(self.labels, return_counts=True), strict=True):
                n = np.arange(max(1, a + b - count), min(a, b) + 1)
                gain = n / count * np.log(n * count / (float(a) * b))
                total += times_a * times_b * float((gain * hypergeom.pmf(n, count, a, b)).sum())
        return float(total)


def _entropy(sizes: Ints) -> float:
    share = sizes / sizes.sum()
    return float(-(share * np.log(share)).sum())


def bcubed_after_merges(label: Ints, merges: Ints) -> Floats:
    """B-cubed F after each merge: ``(N,), (N - 1, 2)`` as in scipy's linkage, to ``(N,)``, of which the first is before any.

    The smaller cluster's counts are poured into the larger's, so that all merges together cost N log N.
    """
    count = len(label)
    sizes = dict(zip(*(x.tolist() for x in np.unique(label, return_counts=True)), strict=True))
    members: dict[int, dict[int, int]] = {i: {int(x): 1} for i, x in enumerate(label)}
    square, size = dict.fromkeys(members, 1), dict.fromkeys(members, 1)
    precision, recall = float(count), sum(1 / sizes[int(x)] for x in label)
    found = [2 * precision * recall / (precision + recall) / count]
    for step, (a, b) in enumerate(merges.tolist()):
        large, small = (a, b) if len(members[a]) >= len(members[b]) else (b, a)
        into, total = members.pop(large), square[a] + square[b]
        for key, n in members.pop(small).items():
            there = into.get(key, 0)
            into[key] = there + n
            total += 2 * there * n
            recall += 2 * there * n / sizes[key]
        new = count + step
        members[new], square[new], size[new] = into, total, size[a] + size[b]
        precision += total / size[new] - square[a] / size[a] - square[b] / size[b]
        found.append(2 * precision * recall / (precision + recall) / count)
    return np.array(found)


@dataclass(frozen=True)
class Clustering:
    """Agglomerative clustering (as in FaceNet's figure 7), average linkage on squared L2 distance of unit vectors.

    Clusters are merged while their mean distance is at most ``threshold`` (0 to 4): no number of clusters is given, for
    that would tell part of the answer. With null the threshold is chosen by best B-cubed F on every other label, and the
    metrics are of the items of the labels between: other items, other labels, about as many of both. At most ``most``
    items are used, as whole labels chosen by a hash: distances take 8 most² bytes. Equal contents are one item; items
    without a label are left out.

    ``clustering/<name>/...``: ``bcubed_precision``, ``bcubed_recall``, ``bcubed_f``, ``nmi``, ``ami`` (NMI rises with the
    number of clusters, AMI is corrected for chance), ``clusters`` found, ``labels`` there are, and the ``threshold``.
    """

    name: str
    source: Source
    most: int
    threshold: float | None

    def __post_init__(self) -> None:
        check_source("clustering", self.name, self.source)
        if self.most < 2:
            raise InputError(f"evaluation.most={self.most}: 2 items or more are needed.")
        if self.threshold is not None and not 0 <= self.threshold <= 4:
            raise InputError(
                f"evaluation.threshold={self.threshold}: squared distances of unit vectors are from 0 to 4; null chooses one."
            )

    def __call__(self, encode: EncodeFunction) -> dict[str, float]:
        """All metrics, from one call of ``encode``."""
        suite = f"clustering of {self.name}"
        items = self._chosen(read_labeled_items(self.source, suite), suite)
        z = encode_unit(encode, items.items, suite)
        measured, threshold = torch.ones(len(items), dtype=torch.bool), self.threshold
        if threshold is None:
            measured = self._half(items.label, suite)
            threshold = best_threshold(linkage_tree(z[~measured]), items.label[~measured].numpy())
        cluster = fcluster(linkage_tree(z[measured]), threshold, "distance")
        table = Contingency.of(cluster.astype(np.int64), items.label[measured].numpy())
        precision, recall, f = table.bcubed()
        found = {
            "bcubed_precision": precision,
            "bcubed_recall": recall,
            "bcubed_f": f,
            "nmi": table.nmi(),
            "ami": table.ami(),
            "clusters": float(len(table.clusters)),
            "labels": float(len(table.labels)),
            "threshold": threshold,
        }
        return {f"clustering/{self.name}/{metric}": value for metric, value in found.items()}

    def _chosen(self, items: LabeledItems, suite: str) -> LabeledItems:
        """Labelled items, at most ``most``."""
        sizes = torch.bincount(items.label[items.label >= 0]).tolist()
        labels, room = [], self.most
        for label in sorted((x for x, size in enumerate(sizes) if size), key=_hash):
            if sizes[label] <= room:
                labels.append(label)
                room -= sizes[label]
        kept = items.select(torch.isin(items.label, torch.tensor(labels, dtype=torch.long)).nonzero().squeeze(1))
        repeated = sum(sizes[label] > 1 for label in labels)
        if len(labels) < 2 or not repeated:
            raise InputError(
                f"{suite}: {len(kept)} items of {len(labels)} labels, {repeated} of them repeated; 2 labels are needed, of "
                "which one has several items. Use other labels, or raise evaluation.most."
            )
        if len(kept) < sum(sizes):
            warn_once(
                f"{suite}: {len(kept)} of {sum(sizes)} items are used, {len(labels)} whole labels "
                f"(evaluation.most={self.most}: memory grows with its square)."
            )
        if bare := len(items) - sum(sizes):
            warn_once(f"{suite}: {bare} of {len(items)} items have no label and are left out.")
        return kept

    def _half(self, label: Tensor, suite: str) -> Tensor:
        """``(N,)``: is the item measured? Repeated labels and single ones are halved each."""
        values, sizes = (x.tolist() for x in label.unique(return_counts=True))
        order = sorted(zip(values, sizes, strict=True), key=lambda pair: (pair[1] == 1, _hash(pair[0])))
        repeated = sum(size > 1 for size in sizes)
        if len(order) < 4 or repeated < 2:
            raise InputError(
                f"{suite}: {len(order)} labels, {repeated} of them repeated, cannot be halved to choose a threshold on the "
                "one half; 4 are needed, 2 of them repeated. Set evaluation.threshold, as 1.0."
            )
        return torch.isin(label, torch.tensor([value for value, _ in order[1::2]]))


def linkage_tree(z: Tensor) -> Floats:
    """Scipy's linkage of unit vectors ``(N, D)``, ``(N - 1, 4)``: the heights are mean squared distances."""
    distance = np.empty(len(z) * (len(z) - 1) // 2)  # each pair once, row before column
    done = 0
    for start in range(0, len(z), 256):
        block = (2 - 2 * (z[start : start + 256] @ z[start:].T)).clamp(0, 4).round(decimals=12).numpy()
        for i, row in enumerate(block, start=1):
            distance[done : done + len(row) - i] = row[i:]
            done += len(row) - i
    return np.asarray(linkage(distance, "average"))


def best_threshold(merges: Floats, label: Ints) -> float:
    """The height of best B-cubed F: ``(N - 1, 4), (N,)``. Merges at one height are all made or none.

    It is below 0 where nothing should be merged, although equal vectors are there.
    """
    heights, last = np.unique(merges[::-1, 2], return_index=True)
    f = bcubed_after_merges(label, merges[:, :2].astype(np.int64))
    after = f[len(merges) - last]  # the last merge of each height
    return middle_of_best(heights, np.append(f[0], after).round(12))


def _hash(label: int) -> str:
    return hashlib.blake2b(str(label).encode()).hexdigest()
