"""How well a clustering agrees with labels. In float64: torchmetrics' AMI is off by 0.002 at 1,300 items, and takes 20 s."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import hypergeom

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


def bcubed_of_merges(label: Ints, merges: Ints) -> Floats:
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
