"""Clustering: how well clusters of embeddings agree with labels.

In float64 and not by torchmetrics, whose NMI is in float32 (6e-8 off at 1,300 items) and whose AMI is 1e-4 off and takes 21 s.
"""

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.stats import hypergeom
from torch import Tensor

from tercet.errors import InputError
from tercet.evaluation.inputs import LabeledItems, Rows, check_source, encode_unit, read_labeled_items
from tercet.evaluation.verification import middle_of_best
from tercet.messages import warn_once
from tercet.types import EncodeFunction

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def agreement(cluster: Ints, label: Ints) -> dict[str, float]:
    """Compare clusters ``(N,)`` and labels ``(N,)``, any whole numbers.

    - ``bcubed_precision``, the mean over items of the share of its cluster that has its label, itself included;
      ``bcubed_recall``, that of its label that is in its cluster; ``bcubed_f``, their harmonic mean (Bagga and Baldwin 1998);
    - ``nmi``, mutual information over the mean of the two entropies; 0 where both are 0;
    - ``ami``, (MI - E) / (mean entropy - E), E being the expectation of MI by chance for these sizes (Vinh et al. 2010); 0
      where chance leaves nothing to gain: one cluster, or one for each item;
    - ``clusters`` and ``labels``, their numbers.
    """
    _, cluster, clusters = np.unique(cluster, return_inverse=True, return_counts=True)
    _, label, labels = np.unique(label, return_inverse=True, return_counts=True)
    # Pairs of a cluster and a label that share items.
    cells, joint = np.unique(cluster * len(labels) + label, return_counts=True)
    a, b, count = clusters[cells // len(labels)], labels[cells % len(labels)], labels.sum()
    square = joint.astype(np.float64) ** 2
    precision, recall = (square / a).sum() / count, (square / b).sum() / count
    information = float(max(0.0, (joint / count * np.log(joint * count / (a.astype(np.float64) * b))).sum()))
    entropy, expected = (_entropy(clusters) + _entropy(labels)) / 2, _expected_information(clusters, labels)
    return {
        "bcubed_precision": float(precision),
        "bcubed_recall": float(recall),
        "bcubed_f": float(2 * precision * recall / (precision + recall)),
        "nmi": information / entropy if entropy > 0 else 0.0,
        "ami": (information - expected) / (entropy - expected) if entropy - expected > 1e-9 else 0.0,
        "clusters": float(len(clusters)),
        "labels": float(len(labels)),
    }


def _entropy(sizes: Ints) -> float:
    share = sizes / sizes.sum()
    return float(-(share * np.log(share)).sum())


def _expected_information(clusters: Ints, labels: Ints) -> float:
    """Expected mutual information in nats, over the distinct pairs of sizes, of which there are few."""
    count, total = int(labels.sum()), 0.0
    for a, times_a in zip(*np.unique(clusters, return_counts=True), strict=True):
        for b, times_b in zip(*np.unique(labels, return_counts=True), strict=True):
            n = np.arange(max(1, a + b - count), min(a, b) + 1)
            gain = n / count * np.log(n * count / (float(a) * b))
            total += times_a * times_b * float((gain * hypergeom.pmf(n, count, a, b)).sum())
    return float(total)


def bcubed_after_merges(label: Ints, merges: Ints) -> Floats:
    """B-cubed F before any merge and after each: ``(N,), (N - 1, 2)`` as in scipy's linkage, to ``(N,)``.

    The smaller cluster's counts are added to the larger's, so that all merges together cost N log N.
    """
    count = len(label)
    sizes = dict(zip(*(x.tolist() for x in np.unique(label, return_counts=True)), strict=True))
    members: dict[int, dict[int, int]] = {i: {int(x): 1} for i, x in enumerate(label)}
    square, size = dict.fromkeys(members, 1), dict.fromkeys(members, 1)
    precision, recall = float(count), sum(1 / sizes[int(x)] for x in label)
    f = [2 * precision * recall / (precision + recall) / count]
    for step, (a, b) in enumerate(merges.tolist()):
        large, small = (a, b) if len(members[a]) >= len(members[b]) else (b, a)
        into, total = members.pop(large), square[a] + square[b]
        for key, n in members.pop(small).items():
            present = into.get(key, 0)
            into[key] = present + n
            total += 2 * present * n
            recall += 2 * present * n / sizes[key]
        new = count + step
        members[new], square[new], size[new] = into, total, size[a] + size[b]
        precision += total / size[new] - square[a] / size[a] - square[b] / size[b]
        f.append(2 * precision * recall / (precision + recall) / count)
    return np.array(f)


@dataclass(frozen=True)
class Clustering:
    """Agglomerative clustering (as in FaceNet's figure 7), average linkage on squared L2 distance of unit vectors.

    Clusters are merged while their mean distance is at most ``threshold`` (0 to 4); the number of clusters is not given, for
    it would be part of the answer. By default the threshold is chosen by best B-cubed F on every other label, and the
    metrics are of the items of the labels between: other items, other labels, about as many of both. At most ``max_items``
    items are used, as whole labels chosen by a hash: distances take 8 max_items² bytes. Equal contents are one item; items
    without a label are left out.

    ``clustering/<name>/...``: ``bcubed_precision``, ``bcubed_recall``, ``bcubed_f``, ``nmi``, ``ami`` (NMI rises with the
    number of clusters, AMI is corrected for chance), the numbers of ``clusters`` and ``labels``, and the ``threshold``.

    >>> source = {"text": ["ab", "aab", "cd", "dd"], "label": [0, 0, 1, 1]}
    >>> def count_letters(texts):
    ...     return np.array([[text.count(letter) for letter in "abcd"] for text in texts])
    >>> Clustering(source, threshold=1.0)(count_letters)["clustering/items/bcubed_f"]
    1.0
    """

    source: Rows
    threshold: float | None = None
    max_items: int = 5000
    name: str = "items"
    needs: ClassVar[frozenset[str]] = frozenset({"label"})

    def __post_init__(self) -> None:
        check_source("clustering", self.name, self.source)
        if self.max_items < 2:
            raise InputError(f"`max_items`={self.max_items}: 2 items or more are needed.")
        if self.threshold is not None and not 0 <= self.threshold <= 4:
            raise InputError(f"`threshold`={self.threshold}: a squared distance from 0 to 4; by default one is chosen.")

    def __call__(self, encode: EncodeFunction) -> dict[str, float]:
        """Measure, with one call of ``encode``."""
        suite = f"clustering of {self.name}"
        items = self._choose(read_labeled_items(self.source, suite), suite)
        z = encode_unit(encode, items.items, suite)
        measured, threshold = torch.ones(len(items), dtype=torch.bool), self.threshold
        if threshold is None:
            measured = self._half(items.label, suite)
            threshold = best_threshold(linkage_tree(z[~measured]), items.label[~measured].numpy())
        cluster = fcluster(linkage_tree(z[measured]), threshold, "distance")
        metrics = agreement(cluster.astype(np.int64), items.label[measured].numpy()) | {"threshold": threshold}
        return {f"clustering/{self.name}/{metric}": value for metric, value in metrics.items()}

    def _choose(self, items: LabeledItems, suite: str) -> LabeledItems:
        """Labeled items, at most ``max_items``."""
        sizes = torch.bincount(items.label[items.label >= 0]).tolist()
        labels, room = [], self.max_items
        for label in sorted((x for x, size in enumerate(sizes) if size), key=_label_hash):
            if sizes[label] <= room:
                labels.append(label)
                room -= sizes[label]
        chosen = items.select(torch.isin(items.label, torch.tensor(labels, dtype=torch.long)).nonzero().squeeze(1))
        repeated = sum(sizes[label] > 1 for label in labels)
        if len(labels) < 2 or not repeated:
            raise InputError(
                f"{suite}: {len(chosen)} items of {len(labels)} labels, {repeated} of them repeated; 2 labels are needed, of "
                "which one has several items. Use other labels, or raise `max_items`."
            )
        if len(chosen) < sum(sizes):
            warn_once(f"{suite}: {len(chosen)} of {sum(sizes)} items are used, {len(labels)} whole labels (max_items).")
        if unlabeled := len(items) - sum(sizes):
            warn_once(f"{suite}: {unlabeled} of {len(items)} items have no label and are left out.")
        return chosen

    def _half(self, label: Tensor, suite: str) -> Tensor:
        """``(N,)``: is the item measured? Repeated labels and single ones are halved each."""
        values, sizes = (x.tolist() for x in label.unique(return_counts=True))
        order = sorted(zip(values, sizes, strict=True), key=lambda pair: (pair[1] == 1, _label_hash(pair[0])))
        repeated = sum(size > 1 for size in sizes)
        if len(order) < 4 or repeated < 2:
            raise InputError(
                f"{suite}: {len(order)} labels, {repeated} of them repeated, cannot be halved to choose a threshold on the "
                "one half; 4 are needed, 2 of them repeated. Set `threshold`, as 1.0."
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
    """The height of best B-cubed F: ``(N - 1, 4), (N,)``. Of the merges at one height all are made or none.

    It is below 0 where no merge is best, although there are equal vectors.
    """
    heights, last = np.unique(merges[::-1, 2], return_index=True)
    f = bcubed_after_merges(label, merges[:, :2].astype(np.int64))
    after = f[len(merges) - last]  # the last merge of each height
    return middle_of_best(heights, np.append(f[0], after).round(12))


def _label_hash(label: int) -> str:
    return hashlib.blake2b(str(label).encode()).hexdigest()
