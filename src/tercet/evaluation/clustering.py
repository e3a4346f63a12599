"""Clustering: how well clusters of embeddings agree with labels."""

import hashlib
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.stats import hypergeom
from torch import Tensor

from tercet.errors import InputError, require
from tercet.evaluation.inputs import Floats, Ints, LabeledItems, Rows, check_source, encode_unit, read_labeled_items
from tercet.evaluation.verification import middle_of_best
from tercet.messages import warn_once
from tercet.types import EncodeFunction


def agreement(cluster: Ints, label: Ints) -> dict[str, float]:
    """Compare clusters ``(N,)`` and labels ``(N,)``, any whole numbers; float64, unlike torchmetrics (AMI 1e-4 off, in 21 s).

    B-cubed precision is the mean over items of the share of its cluster that has its label, itself included; recall that of
    its label that is in its cluster; F their harmonic mean (Bagga and Baldwin 1998). NMI is mutual information over the mean
    of the two entropies and rises with the number of clusters; AMI is corrected for chance (Vinh et al. 2010), 0 where chance
    leaves nothing to gain: one cluster, or one for each item.
    """
    _, cluster, clusters = np.unique(cluster, return_inverse=True, return_counts=True)
    _, label, labels = np.unique(label, return_inverse=True, return_counts=True)
    cells, joint = np.unique(cluster * len(labels) + label, return_counts=True)  # a cluster and a label that share items
    a, b, count = clusters[cells // len(labels)], labels[cells % len(labels)], labels.sum()
    square = joint.astype(np.float64) ** 2
    precision, recall = (square / a).sum() / count, (square / b).sum() / count
    information = float(max(0.0, (joint / count * np.log(joint * count / (a.astype(np.float64) * b))).sum()))
    entropy = float(sum(-(share * np.log(share)).sum() for share in (clusters / count, labels / count))) / 2
    expected = _expected_information(clusters, labels)
    nmi = information / entropy if entropy > 0 else 0.0
    ami = (information - expected) / (entropy - expected) if entropy - expected > 1e-9 else 0.0
    names = ("bcubed_precision", "bcubed_recall", "bcubed_f", "nmi", "ami", "clusters", "labels")
    values = precision, recall, 2 * precision * recall / (precision + recall), nmi, ami, len(clusters), len(labels)
    return {name: float(value) for name, value in zip(names, values, strict=True)}


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
    """B-cubed F before any merge and after each, in N log N: ``(N,), (N - 1, 2)`` as in scipy's linkage, to ``(N,)``."""
    count, labels = len(label), label.tolist()
    sizes = Counter(labels)
    members: dict[int, Counter[int]] = {i: Counter([x]) for i, x in enumerate(labels)}
    square, size = dict.fromkeys(members, 1), dict.fromkeys(members, 1)
    precision, recall = float(count), sum(1 / sizes[x] for x in labels)
    f = [2 * precision * recall / (precision + recall) / count]
    for new, (a, b) in enumerate(merges.tolist(), start=count):
        large, small = (a, b) if len(members[a]) >= len(members[b]) else (b, a)
        into, total = members.pop(large), square[a] + square[b]
        for key, n in members.pop(small).items():
            total += 2 * into[key] * n
            recall += 2 * into[key] * n / sizes[key]
            into[key] += n
        members[new], square[new], size[new] = into, total, size[a] + size[b]
        precision += total / size[new] - square[a] / size[a] - square[b] / size[b]
        f.append(2 * precision * recall / (precision + recall) / count)
    return np.array(f)


@dataclass(frozen=True)
class Clustering:
    """Agglomerative clustering (as in FaceNet's figure 7), average linkage on squared L2 distance of unit vectors.

    Clusters are merged while their mean distance is at most ``threshold`` (0 to 4). By default it is chosen by best B-cubed F
    on every other label, and the metrics are of the items of the labels between. At most ``max_items`` items are used, as
    whole labels chosen by a hash: distances take 8 max_items² bytes. Equal contents are one item; items without a label are
    left out. ``clustering/<name>/...``: what ``agreement`` returns, and the ``threshold``. No metric has values by example:
    whether an item is in the right cluster depends on the other items, so that items are no independent examples.

    >>> source = {"text": ["ab", "aab", "cd", "dd"], "label": [0, 0, 1, 1]}
    >>> encode = lambda texts: np.array([[text.count(letter) for letter in "abcd"] for text in texts])
    >>> Clustering(source, threshold=1.0)(encode)["clustering/items/bcubed_f"]
    1.0
    """

    source: Rows
    threshold: float | None = None
    max_items: int = 5000
    name: str = "items"
    needs: ClassVar[frozenset[str]] = frozenset({"label"})
    smaller_is_better: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        check_source("clustering", self.name, self.source)
        require(self.max_items >= 2, f"`max_items`={self.max_items}: 2 items or more are needed.")
        if self.threshold is not None and not 0 <= self.threshold <= 4:
            raise InputError(f"`threshold`={self.threshold}: a squared distance from 0 to 4; by default one is chosen.")

    def __call__(self, encode: EncodeFunction) -> dict[str, float]:
        """Measure, with one call of ``encode``."""
        suite = f"clustering of {self.name}"
        items = self._choose(read_labeled_items(self.source, suite), suite)
        z = encode_unit(encode, items.items, suite)
        label, threshold = items.label.numpy(), self.threshold
        if threshold is None:
            measured = self._half(items.label, suite)
            threshold = best_threshold(linkage_tree(z[~measured]), label[~measured.numpy()])
            z, label = z[measured], label[measured.numpy()]
        cluster = fcluster(linkage_tree(z), threshold, "distance")
        metrics = agreement(cluster.astype(np.int64), label) | {"threshold": threshold}
        return {f"clustering/{self.name}/{metric}": value for metric, value in metrics.items()}

    def _choose(self, items: LabeledItems, suite: str) -> LabeledItems:
        """Labeled items, at most ``max_items``."""
        sizes = Counter(x for x in items.label.tolist() if x >= 0)
        labels, room = [], self.max_items
        for label in sorted(sizes, key=_label_hash):
            if sizes[label] <= room:
                labels.append(label)
                room -= sizes[label]
        chosen, repeated = self.max_items - room, sum(sizes[label] > 1 for label in labels)
        if len(labels) < 2 or not repeated:
            found = f"{chosen} items of {len(labels)} labels, {repeated} of them repeated"
            raise InputError(f"{suite}: {found}; 2 labels are needed, one of them repeated. Use others, or raise `max_items`.")
        if chosen < sizes.total():
            warn_once(f"{suite}: {chosen} of {sizes.total()} items are used, {len(labels)} whole labels (max_items).")
        if unlabeled := len(items.label) - sizes.total():
            warn_once(f"{suite}: {unlabeled} of {len(items.label)} items have no label and are left out.")
        which = torch.isin(items.label, torch.tensor(labels)).nonzero().squeeze(1)
        return LabeledItems([items.items[i] for i in which.tolist()], items.label[which], items.names)

    def _half(self, label: Tensor, suite: str) -> Tensor:
        """``(N,)``: is the item measured? Repeated labels and single ones are halved each."""
        sizes = Counter(label.tolist())
        order = sorted(sizes, key=lambda value: (sizes[value] == 1, _label_hash(value)))
        repeated = sum(size > 1 for size in sizes.values())
        if len(order) < 4 or repeated < 2:
            fault = f"{len(order)} labels, {repeated} of them repeated, cannot be halved to choose a threshold on the one half"
            raise InputError(f"{suite}: {fault}; 4 are needed, 2 of them repeated. Set `threshold`, as 1.0.")
        return torch.isin(label, torch.tensor(order[1::2]))


def linkage_tree(z: Tensor) -> Floats:
    """Scipy's linkage of unit vectors ``(N, D)``, ``(N - 1, 4)``: the heights are mean squared distances."""
    blocks = ((2 - 2 * (z[i : i + 256] @ z[i:].T)).clamp(0, 4).round(decimals=12) for i in range(0, len(z), 256))
    distance = torch.cat([block[torch.ones_like(block, dtype=torch.bool).triu(1)] for block in blocks])  # row before column
    return np.asarray(linkage(distance.numpy(), "average"))


def best_threshold(merges: Floats, label: Ints) -> float:
    """The height of best B-cubed F, below 0 where no merge is best: ``(N - 1, 4), (N,)``. Of one height all merge or none."""
    heights, last = np.unique(merges[::-1, 2], return_index=True)  # the last merge of each height
    f = bcubed_after_merges(label, merges[:, :2].astype(np.int64))
    return middle_of_best(heights, np.append(f[0], f[len(merges) - last]).round(12))


def _label_hash(label: int) -> str:
    return hashlib.blake2b(str(label).encode()).hexdigest()
