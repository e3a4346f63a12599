"""Do the nearest neighbours have the label of the query?"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tercet.errors import InputError
from tercet.evaluation.inputs import (
    LabeledItems,
    check_source,
    encode_unit,
    item_hash,
    match_labels,
    read_labeled_items,
)
from tercet.evaluation.search import nearest
from tercet.messages import warn_once
from tercet.types import EncodeFunction, Source

BLOCK = 256  # queries at a time


@dataclass(frozen=True)
class NearestNeighbor:
    """The first column of a labelled source, texts or images: each item is sought among all others, by cosine.

    With a ``reference`` the neighbours are from there: the accuracy of a test set by a training set. Its labels must be
    the same, see ``matched``. Equal contents are one item; a query never finds itself, in the reference neither. Items
    without a label are there to be found, wrongly, but are no queries; nor are items whose label nothing else has: they
    are counted and said. ``nearest_neighbor/<name>/...``, as means over queries, R being how many items have the query's label:

    - ``recall@k``: is any of the k nearest of the label?
    - ``r_precision``: the share of the R nearest that are of the label;
    - ``map@r``: 1/R sum over i <= R of P(i) rel(i) (Musgrave et al. 2020, arXiv:2003.08505, eq. 2);
    - ``knn_accuracy``: does the label of most of the ``neighbours`` nearest equal the query's? Of labels that are as
      frequent that with the larger sum of cosines. Items without a label do not vote.
    """

    name: str
    source: Source
    reference: Source | None
    ks: Sequence[int]
    neighbors: int

    def __post_init__(self) -> None:
        check_source("nearest_neighbor", self.name, self.source)
        if not self.ks or any(type(k) is not int or k < 1 for k in self.ks):
            raise InputError(f"evaluation.ks={self.ks}: a list of ranks from 1 on, as [1, 10].")
        if self.neighbors < 1:
            raise InputError(f"evaluation.neighbors={self.neighbors}: 1 or more neighbours vote.")

    def __call__(self, encode: EncodeFunction) -> dict[str, float]:
        """All metrics, from one call of ``encode`` with each item once."""
        suite = f"nearest_neighbor of {self.name}"
        items = read_labeled_items(self.source, suite)
        queries, label, own, pool = self._sides(items, suite)
        most = int(pool.label.max()) + 1 if len(pool) else 0
        sizes = torch.bincount(pool.label[pool.label >= 0], minlength=most + 3)  # -2 and -1 are 0 at the end
        relevant = sizes[label] - ((own >= 0) & (pool.label[own] == label)).long()
        chosen = (label != -1) & (relevant > 0)
        self._check(label, chosen, pool, suite)
        z = encode_unit(encode, [*(queries.items if self.reference else ()), *pool.items], suite).float()
        x, y = (z[: len(queries)], z[len(queries) :]) if self.reference else (z, z)
        found = nearest_neighbor_metrics(
            x[chosen], y, own[chosen], label[chosen], pool.label, relevant[chosen], self.ks, self.neighbors
        )
        return {f"nearest_neighbor/{self.name}/{metric}": value for metric, value in found.items()}

    def _sides(self, items: LabeledItems, suite: str) -> tuple[LabeledItems, Tensor, Tensor, LabeledItems]:
        """Queries, their labels, their own places in the pool, and the pool."""
        if self.reference is None:
            return items, items.label, torch.arange(len(items)), items
        pool = read_labeled_items(self.reference, f"reference of {suite}")
        place = {item_hash(item): i for i, item in enumerate(pool.items)}
        own = torch.tensor([place.get(item_hash(item), -1) for item in items.items], dtype=torch.long)
        if both := int((own >= 0).sum()):
            warn_once(f"{suite}: {both} of {len(items)} items are in the reference too, where they do not find themselves.")
        return items, match_labels(items.label, items.names, pool, suite), own, pool

    def _check(self, label: Tensor, chosen: Tensor, pool: LabeledItems, suite: str) -> None:
        asked = int((label != -1).sum())
        if not chosen.any():
            raise InputError(
                f"{suite}: none of {len(label)} items has a label that another item has too, so there is nothing to find. "
                "Is it the right column of labels?"
            )
        if len(pool.label.unique()) == 1:
            raise InputError(f"{suite}: all items have one label, so whatever is found is right. Use data with more labels.")
        if lone := asked - int(chosen.sum()):
            warn_once(f"{suite}: {lone} of {asked} labelled items have a label that no other item has; they are no queries.")
        if bare := len(label) - asked:
            warn_once(f"{suite}: {bare} of {len(label)} items have no label; they are no queries.")


def nearest_neighbor_metrics(
    x: Tensor,
    y: Tensor,
    own: Tensor,
    label: Tensor,
    labels: Tensor,
    relevant: Tensor,
    ks: Sequence[int],
    neighbours: int,
) -> dict[str, float]:
    """The metrics of queries ``x (Q, D)`` in a pool ``y (M, D)``.

    ``own (Q,)`` is a query's place in the pool or -1, ``label (Q,)`` and ``labels (M,)`` are theirs, ``relevant (Q,)`` is R.
    """
    order = relevant.argsort(stable=True)  # so that a block looks no deeper than its own largest R
    parts: list[Tensor] = []
    for rows in order.split(BLOCK):
        r = relevant[rows]
        cosine, found = nearest(x[rows], y, max(int(r.max()), *ks, neighbours), own=own[rows])
        there = torch.where(found >= 0, labels[found], -1)
        hit = (there == label[rows, None]).double()
        rank = torch.arange(1, found.shape[1] + 1)
        within = hit * (rank <= r[:, None])
        precision = hit.cumsum(1) / rank
        parts.append(
            torch.stack(
                [
                    *((hit[:, :k].sum(1) > 0).double() for k in ks),
                    within.sum(1) / r,
                    (within * precision).sum(1) / r,
                    (majority_label(there[:, :neighbours], cosine[:, :neighbours]) == label[rows]).double(),
                ]
            )
        )
    names = [*(f"recall@{k}" for k in ks), "r_precision", "map@r", "knn_accuracy"]
    return dict(zip(names, torch.cat(parts, 1).mean(1).tolist(), strict=True))


def majority_label(labels: Tensor, cosine: Tensor) -> Tensor:
    """The most frequent label of each row, ties by summed cosine, then by the nearest: ``(Q, k), (Q, k)`` to ``(Q,)``.

    Negative labels have no vote; -1 where nobody votes.
    """
    same = (labels[:, :, None] == labels[:, None, :]) & (labels >= 0)[:, None, :]
    count = same.sum(2)
    weight = (same * cosine.nan_to_num(neginf=0.0)[:, None, :].double()).sum(2).round(decimals=6)
    ahead = (labels >= 0) & (count == count.amax(1, keepdim=True))
    return labels.gather(1, weight.masked_fill(~ahead, -torch.inf).argmax(1, keepdim=True)).squeeze(1)
