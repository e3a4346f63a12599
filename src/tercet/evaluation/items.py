"""The labelled items of a source."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tercet.contract import Item, Source
from tercet.error import InputError
from tercet.image import content
from tercet.notice import say_once


@dataclass(frozen=True)
class Items:
    """N different texts or images and ``label (N,)``, -1 where there is none; ``names`` of the labels, if the source has them.

    They stand in the order of a hash of their content: where an order decides between ties, it must not know the labels.
    """

    items: Sequence[Item]
    label: Tensor
    names: Sequence[str] | None

    def __len__(self) -> int:
        return len(self.items)

    def only(self, which: Tensor) -> "Items":
        """The chosen ones, by index ``(n,)``."""
        return Items([self.items[i] for i in which.tolist()], self.label[which], self.names)


def key(item: Item) -> bytes:
    """A hash of the content."""
    return hashlib.blake2b(item.encode() if isinstance(item, str) else item, digest_size=16).digest()


def read_items(source: Source, suite: str) -> Items:
    """The first column of the source, equal contents once: a copy of the query would be a hit that no model has earned.

    A content that is there under several labels has none. ``suite`` opens messages, as "labelled of trec".

    Raises:
        InputError: there are no labels, or an image cannot be read.
    """
    rows = source.rows()
    column = source.columns[0]
    if "label" not in rows.column_names:
        raise InputError(
            f"{suite} needs labels, but the source has only the columns {', '.join(rows.column_names)}. Name the column of "
            "labels in its `label`, or use evaluation=retrieval."
        )
    items = [_item(cell, suite, number) for number, cell in enumerate(rows[column], start=1)]
    labels: dict[bytes, set[int]] = {}
    first: dict[bytes, Item] = {}
    for item, label in zip(items, rows["label"], strict=True):
        mark = key(item)
        first.setdefault(mark, item)
        labels.setdefault(mark, set()).update({int(label)} if label is not None and label >= 0 else ())
    if copies := len(items) - len(first):
        say_once(f"{suite}: {copies} of {len(items)} items are copies of others and are left out.")
    if torn := sum(len(found) > 1 for found in labels.values()):
        say_once(f"{suite}: {torn} items are there under several labels; they count as having none.")
    order = sorted(first)
    label = torch.tensor([next(iter(labels[m])) if len(labels[m]) == 1 else -1 for m in order], dtype=torch.long)
    return Items([first[mark] for mark in order], label, getattr(rows.features["label"], "names", None))


def _item(cell: object, suite: str, number: int) -> Item:
    if isinstance(cell, str):
        return cell
    try:
        return content(cell)
    except (OSError, TypeError) as error:
        raise InputError(f"{suite}: the image of row {number} cannot be read: {error}") from error


def matched(label: Tensor, names: Sequence[str] | None, reference: Items, suite: str) -> Tensor:
    """Labels in the numbers of ``reference``, ``(N,)``; -2 for one that it lacks.

    Sources number labels each for itself. By name where both have names; else both must hold the same numbers, for only
    then were they made from as many values.

    Raises:
        InputError: the numbers differ.
    """
    if names is not None and reference.names is not None:
        place = {name: i for i, name in enumerate(reference.names)}
        table = torch.tensor([*(place.get(name, -2) for name in names), -1])  # the last is that of label -1
        return table[label]
    own, others = (set(x[x >= 0].tolist()) for x in (label, reference.label))
    if own != others:
        raise InputError(
            f"{suite}: evaluation.source has {len(own)} labels, evaluation.reference {len(others)}, and they are not the same "
            "numbers. Each source numbers its labels for itself, so they agree only where both hold all labels. Use such "
            "sources, or evaluation.reference=null."
        )
    return label
