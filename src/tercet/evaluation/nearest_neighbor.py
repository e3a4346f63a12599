"""Nearest neighbors: do they have the label of the query?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tercet.errors import InputError, require
from tercet.evaluation.inputs import LabeledItems, Rows, check_ranks, check_source, encode_unit, read_labeled_items
from tercet.evaluation.search import nearest
from tercet.messages import warn_once
from tercet.types import EncodeFunction

BLOCK = 256  # queries at a time


@dataclass(frozen=True)
class NearestNeighbor:
    """Searches each item of a labeled source (its first column, texts or images) among all others, by cosine.

    With a ``reference``, whose labels must be the same, the neighbors are from there: the accuracy of a test set by a training
    set. Equal contents are one item, and a query never finds itself. Items without a label, or with one that no other item
    has, can be found but are no queries. ``nearest_neighbor/<name>/...``, means over queries, of which R items have the label:
    ``recall@k`` (is any of the k nearest of the label?), ``r_precision`` (the share of the R nearest that are), ``map@r``
    (1/R sum over i <= R of P(i) rel(i); Musgrave et al. 2020, arXiv:2003.08505, eq. 2), and ``knn_accuracy`` (is the label the
    ``majority_label`` of the ``neighbors`` nearest? A tie of votes goes to the larger sum of cosines). ``ks`` are the numbers
    k of ``recall@k``. Items of equal cosine come in the order of a hash of their contents, on which labels have no influence.

    >>> source = {"text": ["ab", "aab", "cd", "dd"], "label": [0, 0, 1, 1]}
    >>> encode = lambda texts: torch.tensor([[text.count(letter) for letter in "abcd"] for text in texts])
    >>> NearestNeighbor(source, neighbors=1)(encode)["nearest_neighbor/items/knn_accuracy"]
    1.0
    """

    source: Rows
    reference: Rows | None = None
    ks: Sequence[int] = (1, 5, 10)
    neighbors: int = 20
    name: str = "items"
    needs: ClassVar[frozenset[str]] = frozenset({"label"})
    smaller_is_better: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        check_source("nearest_neighbor", self.name, self.source)
        check_ranks(self.ks)
        require(self.neighbors >= 1, f"`neighbors`={self.neighbors}: 1 or more neighbors vote.")

    def __call__(self, encode: EncodeFunction) -> dict[str, float]:
        """Measure, with one call of ``encode``."""
        names, values = self._measure_queries(encode)
        return dict(zip(names, values.mean(1).tolist(), strict=True))

    def examples(self, encode: EncodeFunction) -> dict[str, Tensor]:
        """The metrics of each query, ``(Q,)``, whose means ``__call__`` returns; in an order that the labels determine."""
        return dict(zip(*self._measure_queries(encode), strict=True))

    def _measure_queries(self, encode: EncodeFunction) -> tuple[list[str], Tensor]:
        suite = f"nearest_neighbor of {self.name}"
        items = read_labeled_items(self.source, suite)
        label, own, pool = self._pool(items, suite)
        sizes = torch.bincount(pool.label[pool.label >= 0], minlength=max([0, *label.tolist()]) + 1)
        relevant = F.pad(sizes, (0, 2))[label] - ((own >= 0) & (pool.label[own] == label)).long()  # labels -2 and -1: none
        chosen = (label != -1) & (relevant > 0)
        count, labeled, queries = len(label), int((label != -1).sum()), int(chosen.sum())
        fault = f"none of {count} items has a label that another item has too, so there is nothing to find"
        require(queries, f"{suite}: {fault}. Is it the right column of labels?")
        fault = "all items have one label, so whatever is found is right"
        require(len(pool.label.unique()) > 1, f"{suite}: {fault}. Use data with more labels.")
        if alone := labeled - queries:
            warn_once(f"{suite}: {alone} of {labeled} labeled items have a label that no other item has; they are no queries.")
        if labeled < count:
            warn_once(f"{suite}: {count - labeled} of {count} items have no label; they are no queries.")
        z = encode_unit(encode, [*(() if self.reference is None else items.items), *pool.items], suite).float()
        x, y = (z, z) if self.reference is None else z.split([len(items.label), len(pool.label)])
        names = [*(f"recall@{k}" for k in self.ks), "r_precision", "map@r", "knn_accuracy"]
        values = self._measure(x[chosen], y, own[chosen], label[chosen], pool.label, relevant[chosen])
        return [f"nearest_neighbor/{self.name}/{metric}" for metric in names], values

    def _measure(self, x: Tensor, y: Tensor, own: Tensor, label: Tensor, labels: Tensor, relevant: Tensor) -> Tensor:
        """The metrics of queries ``x (Q, D)``, of labels ``label (Q,)``, in a pool ``y (M, D)``, of labels ``labels (M,)``.

        A row for each metric, a column for each query, those with the fewest relevant items first.

        ``own (Q,)`` is a query's index in the pool or -1, ``relevant (Q,)`` is R.
        """
        parts: list[Tensor] = []
        for rows in relevant.argsort(stable=True).split(BLOCK):  # so that a block searches no deeper than its own largest R
            r = relevant[rows]
            cosine, found = nearest(x[rows], y, max(int(r.max()), *self.ks, self.neighbors), own=own[rows])
            found_label = torch.where(found >= 0, labels[found], -1)
            hit = (found_label == label[rows, None]).double()
            rank = torch.arange(1, found.shape[1] + 1)
            within = hit * (rank <= r[:, None])
            average = (within * (hit.cumsum(1) / rank)).sum(1) / r
            vote = majority_label(found_label[:, : self.neighbors], cosine[:, : self.neighbors])
            recalls = [(hit[:, :k].sum(1) > 0).double() for k in self.ks]
            parts.append(torch.stack([*recalls, within.sum(1) / r, average, (vote == label[rows]).double()]))
        return torch.cat(parts, 1)

    def _pool(self, items: LabeledItems, suite: str) -> tuple[Tensor, Tensor, LabeledItems]:
        """The items' labels in the numbering of the pool, their own indices in it (-1: none), and the pool."""
        if self.reference is None:
            return items.label, torch.arange(len(items.label)), items
        pool = read_labeled_items(self.reference, f"reference of {suite}")
        index = {item: i for i, item in enumerate(pool.items)}
        own = torch.tensor([index.get(item, -1) for item in items.items], dtype=torch.long)
        if both := int((own >= 0).sum()):
            warn_once(f"{suite}: {both} of {len(items.label)} items are in the reference, too, and do not find themselves.")
        return match_labels(items.label, items.names, pool, suite), own, pool


def match_labels(label: Tensor, names: Sequence[str] | None, reference: LabeledItems, suite: str) -> Tensor:
    """Convert labels ``(N,)`` to the numbering of ``reference``; -2 for one that it lacks.

    They are matched by name where both sources have names; else both must hold the same numbers, for each source numbers its
    labels independently, and only then were they made from as many values.
    """
    if names is not None and reference.names is not None:
        number = {name: i for i, name in enumerate(reference.names)}
        return torch.tensor([*(number.get(name, -2) for name in names), -1])[label]  # the last is that of label -1
    own, others = (set(x[x >= 0].tolist()) for x in (label, reference.label))
    if own != others:
        fault = f"`source` has {len(own)} labels, `reference` {len(others)}, numbered independently, and the numbers differ"
        raise InputError(f"{suite}: {fault}. Use sources that both hold all labels, or no `reference`.")
    return label


def majority_label(labels: Tensor, cosine: Tensor) -> Tensor:
    """The most frequent label of each row, ties by summed cosine, then by the nearest: ``(Q, k), (Q, k)`` to ``(Q,)``.

    Negative labels have no vote; -1 where there is no vote.
    """
    same = (labels[:, :, None] == labels[:, None, :]) & (labels >= 0)[:, None, :]
    count = same.sum(2)
    weight = (same * cosine.nan_to_num(neginf=0.0)[:, None, :].double()).sum(2).round(decimals=6)
    ahead = (labels >= 0) & (count == count.amax(1, keepdim=True))
    return labels.gather(1, weight.masked_fill(~ahead, -torch.inf).argmax(1, keepdim=True)).squeeze(1)
