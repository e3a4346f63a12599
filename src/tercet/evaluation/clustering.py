"""Do items fall into clusters that are their labels?"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from torch import Tensor

from tercet.contract import Encode, Source
from tercet.error import InputError
from tercet.evaluation.agreement import Contingency, Floats, Ints, bcubed_of_merges
from tercet.evaluation.items import Items, read_items
from tercet.evaluation.pairs import check_source
from tercet.evaluation.threshold import middle_of_best
from tercet.evaluation.unit import unit
from tercet.notice import say_once


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

    def __call__(self, encode: Encode) -> dict[str, float]:
        """All metrics, from one call of ``encode``."""
        suite = f"clustering of {self.name}"
        items = self._chosen(read_items(self.source, suite), suite)
        z = unit(encode, items.items, suite)
        measured, threshold = torch.ones(len(items), dtype=torch.bool), self.threshold
        if threshold is None:
            measured = self._half(items.label, suite)
            threshold = best_threshold(tree(z[~measured]), items.label[~measured].numpy())
        cluster = fcluster(tree(z[measured]), threshold, "distance")
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

    def _chosen(self, items: Items, suite: str) -> Items:
        """Labelled items, at most ``most``."""
        sizes = torch.bincount(items.label[items.label >= 0]).tolist()
        labels, room = [], self.most
        for label in sorted((x for x, size in enumerate(sizes) if size), key=_hash):
            if sizes[label] <= room:
                labels.append(label)
                room -= sizes[label]
        kept = items.only(torch.isin(items.label, torch.tensor(labels, dtype=torch.long)).nonzero().squeeze(1))
        repeated = sum(sizes[label] > 1 for label in labels)
        if len(labels) < 2 or not repeated:
            raise InputError(
                f"{suite}: {len(kept)} items of {len(labels)} labels, {repeated} of them repeated; 2 labels are needed, of "
                "which one has several items. Use other labels, or raise evaluation.most."
            )
        if len(kept) < sum(sizes):
            say_once(
                f"{suite}: {len(kept)} of {sum(sizes)} items are used, {len(labels)} whole labels "
                f"(evaluation.most={self.most}: memory grows with its square)."
            )
        if bare := len(items) - sum(sizes):
            say_once(f"{suite}: {bare} of {len(items)} items have no label and are left out.")
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


def tree(z: Tensor) -> Floats:
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
    f = bcubed_of_merges(label, merges[:, :2].astype(np.int64))
    after = f[len(merges) - last]  # the last merge of each height
    return middle_of_best(heights, np.append(f[0], after).round(12))


def _hash(label: int) -> str:
    return hashlib.blake2b(str(label).encode()).hexdigest()
