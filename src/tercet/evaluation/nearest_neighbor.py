"""Nearest neighbors: do they have the label of the query?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tercet.errors import InputError
from tercet.evaluation.inputs import LabeledItems, Rows, check_ranks, check_source, encode_unit, item_hash, read_labeled_items
from tercet.evaluation.search import nearest
from tercet.messages import warn_once
from tercet.types import EncodeFunction

BLOCK = 256  # queries at a time


@dataclass(frozen=True)
class NearestNeighbor:
    """Searches each item of a labeled source (its first column, texts or images) among all others, by cosine.

    With a ``reference`` the neighbors are from there: the accuracy of a test set by a training set. Its labels must be
    the same, see ``match_labels``. Equal contents are one item; a query never finds itself, nor in the reference. Items
    without a label can be found, which is wrong, but are no queries, nor are items whose label no other item has: a warning
    counts them. ``nearest_neighbor/<name>/...``, as means over queries, R being how many items have the query's label:

    - ``recall@k``: is any of the k nearest of the label?
    - ``r_precision``: the share of the R nearest that are of the label;
    - ``map@r``: 1/R sum over i <= R of P(i) rel(i) (Musgrave et al. 2020, arXiv:2003.08505, eq. 2);
    - ``knn_accuracy``: does the most frequent label of the ``neighbors`` nearest equal the query's? Among equally frequent
      labels that with the larger sum of cosines counts. Items without a label do not vote.

    >>> source = {"text": ["ab", "aab", "cd", "dd"], "label": [0, 0, 1, 1]}
    >>> def count_letters(texts):
    ...     return torch.tensor([[text.count(letter) for letter in "abcd"] for text in texts])
    >>> NearestNeighbor(source, neighbors=1)(count_letters)["nearest_neighbor/items/knn_accuracy"]
    1.0
    """

    source: Rows
    reference: Rows | None = None
    ks: Sequence[int] = (1, 5, 10)
    neighbors: int = 20
    name: str = "items"
    needs: ClassVar[frozenset[str]] = frozenset({"label"})

    def __post_init__(self) -> None:
        check_source("nearest_neighbor", self.name, self.source)
        check_ranks(self.ks)
        if self.neighbors < 1:
            raise InputError(f"`neighbors`={self.neighbors}: 1 or more neighbors vote.")

    def __call__(self, encode: EncodeFunction) -> dict[str, float]:
        """Measure, with one call of ``encode`` with each item once."""
        suite = f"nearest_neighbor of {self.name}"
        items = read_labeled_items(self.source, suite)
        label, own, pool = self._pool(items, suite)
        most = int(pool.label.max()) + 1 if len(pool) else 0
        sizes = torch.bincount(pool.label[pool.label >= 0], minlength=most + 3)  # -2 and -1 are 0 at the end
        relevant = sizes[label] - ((own >= 0) & (pool.label[own] == label)).long()
        chosen = (label != -1) & (relevant > 0)
        _check_queries(label, chosen, pool, suite)
        z = encode_unit(encode, [*(() if self.reference is None else items.items), *pool.items], suite).float()
        x, y = (z, z) if self.reference is None else z.split([len(items), len(pool)])
        metrics = nearest_neighbor_metrics(
            x[chosen], y, own[chosen], label[chosen], pool.label, relevant[chosen], self.ks, self.neighbors
        )
        return {f"nearest_neighbor/{self.name}/{metric}": value for metric, value in metrics.items()}

    def _pool(self, items: LabeledItems, suite: str) -> tuple[Tensor, Tensor, LabeledItems]:
        """The items' labels in the numbering of the pool, their own indices in it (-1: none), and the pool."""
        if self.reference is None:
            return items.label, torch.arange(len(items)), items
        pool = read_labeled_items(self.reference, f"reference of {suite}")
        index = {item_hash(item): i for i, item in enumerate(pool.items)}
        own = torch.tensor([index.get(item_hash(item), -1) for item in items.items], dtype=torch.long)
        if both := int((own >= 0).sum()):
            warn_once(f"{suite}: {both} of {len(items)} items are in the reference too, where they do not find themselves.")
        return match_labels(items.label, items.names, pool, suite), own, pool


def _check_queries(label: Tensor, chosen: Tensor, pool: LabeledItems, suite: str) -> None:
    labeled = int((label != -1).sum())
    if not chosen.any():
        raise InputError(
            f"{suite}: none of {len(label)} items has a label that another item has too, so there is nothing to find. "
            "Is it the right column of labels?"
        )
    if len(pool.label.unique()) == 1:
        raise InputError(f"{suite}: all items have one label, so whatever is found is right. Use data with more labels.")
    if single := labeled - int(chosen.sum()):
        warn_once(f"{suite}: {single} of {labeled} labeled items have a label that no other item has; they are no queries.")
    if unlabeled := len(label) - labeled:
        warn_once(f"{suite}: {unlabeled} of {len(label)} items have no label; they are no queries.")


def match_labels(label: Tensor, names: Sequence[str] | None, reference: LabeledItems, suite: str) -> Tensor:
    """Convert labels ``(N,)`` to the numbering of ``reference``; -2 for one that it lacks.

    Each source numbers its labels independently. They are matched by name where both have names; else both must hold the same
    numbers, for only then were they made from as many values: ``InputError`` where they do not.
    """
    if names is not None and reference.names is not None:
        number = {name: i for i, name in enumerate(reference.names)}
        table = torch.tensor([*(number.get(name, -2) for name in names), -1])  # the last is that of label -1
        return table[label]
    own, others = (set(x[x >= 0].tolist()) for x in (label, reference.label))
    if own != others:
        raise InputError(
            f"{suite}: `source` has {len(own)} labels, `reference` {len(others)}, and they are not the same numbers. Each "
            "source numbers its labels independently, so they agree only where both hold all labels. Use such sources, or "
            "no `reference`."
        )
    return label


def nearest_neighbor_metrics(
    x: Tensor, y: Tensor, own: Tensor, label: Tensor, labels: Tensor, relevant: Tensor, ks: Sequence[int], neighbors: int
) -> dict[str, float]:
    """The metrics of queries ``x (Q, D)`` in a pool ``y (M, D)``.

    ``own (Q,)`` is a query's index in the pool or -1, ``label (Q,)`` and ``labels (M,)`` are theirs, ``relevant (Q,)`` is R.
    """
    order = relevant.argsort(stable=True)  # so that a block searches no deeper than its own largest R
    parts: list[Tensor] = []
    for rows in order.split(BLOCK):
        r = relevant[rows]
        cosine, found = nearest(x[rows], y, max(int(r.max()), *ks, neighbors), own=own[rows])
        found_label = torch.where(found >= 0, labels[found], -1)
        hit = (found_label == label[rows, None]).double()
        rank = torch.arange(1, found.shape[1] + 1)
        within = hit * (rank <= r[:, None])
        precision = hit.cumsum(1) / rank
        vote = majority_label(found_label[:, :neighbors], cosine[:, :neighbors])
        recalls = [(hit[:, :k].sum(1) > 0).double() for k in ks]
        means = [within.sum(1) / r, (within * precision).sum(1) / r, (vote == label[rows]).double()]
        parts.append(torch.stack([*recalls, *means]))
    names = [*(f"recall@{k}" for k in ks), "r_precision", "map@r", "knn_accuracy"]
    return dict(zip(names, torch.cat(parts, 1).mean(1).tolist(), strict=True))


def majority_label(labels: Tensor, cosine: Tensor) -> Tensor:
    """The most frequent label of each row, ties by summed cosine, then by the nearest: ``(Q, k), (Q, k)`` to ``(Q,)``.

    Negative labels have no vote; -1 where there is no vote.
    """
    same = (labels[:, :, None] == labels[:, None, :]) & (labels >= 0)[:, None, :]
    count = same.sum(2)
    weight = (same * cosine.nan_to_num(neginf=0.0)[:, None, :].double()).sum(2).round(decimals=6)
    ahead = (labels >= 0) & (count == count.amax(1, keepdim=True))
    return labels.gather(1, weight.masked_fill(~ahead, -torch.inf).argmax(1, keepdim=True)).squeeze(1)
