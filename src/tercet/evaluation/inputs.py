"""What evaluators share: reading sources, unit vectors, groups of evaluators."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from tercet.errors import InputError
from tercet.images import read_image_cell
from tercet.messages import warn_once
from tercet.types import EncodeFunction, Evaluator, Item, Source

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def encode_unit(encode: EncodeFunction, items: Sequence[Item], name: str) -> Tensor:
    """``(N, D)`` float64, each row of length 1, or 0 where the model gave zeros.

    Raises:
        InputError: an embedding is not finite; every comparison with it would be false, and look like a result.
    """
    z = encode(items).double()
    if bad := int((~z.isfinite()).any(1).sum()):
        raise InputError(
            f"{name}: {bad} of {len(z)} embeddings are not finite (NaN or infinite). The model has diverged, or overflows "
            "in half precision: use another checkpoint or 32-bit precision."
        )
    return F.normalize(z, dim=-1)


def check_name(suite: str, name: str) -> None:
    """Raise ``InputError`` for a name that metrics cannot carry."""
    if not name or "/" in name:
        raise InputError(f"evaluation.name={name!r}: metrics are called {suite}/<name>/..., so a name without '/'.")


def check_source(suite: str, name: str, source: Source | None) -> None:
    """Raise ``InputError`` where there is nothing to read, or no usable name for the metrics."""
    check_name(suite, name)
    if source is None:
        raise InputError(
            f"{suite} of {name} needs held-out rows, but data={name} has none (data.test is null). "
            "Use other data, or another evaluation, such as evaluation@test=sts."
        )


def text_pairs(source: Source, name: str) -> tuple[list[str], list[str], list[int]]:
    """Queries, documents and labels (-1: none), row by row.

    The first two columns of the source. A source of one column has its texts halved at the middle word: the first
    half is the query, the second its document. That is no paraphrase, but it needs no label, and it moves with quality.
    Texts of fewer than 4 words cannot be halved; they are left out, counted and said.
    """
    rows = source.rows()
    columns = list(source.columns)
    label = [int(x) for x in rows["label"]] if "label" in rows.column_names else [-1] * len(rows)
    if len(columns) > 1:
        first, second = list(rows[columns[0]]), list(rows[columns[1]])
    else:
        words = [text.split() for text in rows[columns[0]]]
        long = [i for i, w in enumerate(words) if len(w) >= 4]
        if short := len(words) - len(long):
            warn_once(f"{name}: {short} of {len(words)} held-out texts have fewer than 4 words and are left out.")
        first = [" ".join(words[i][: len(words[i]) // 2]) for i in long]
        second = [" ".join(words[i][len(words[i]) // 2 :]) for i in long]
        label = [label[i] for i in long]
    if len(first) < 2:
        raise InputError(f"{name}: {len(first)} held-out pairs, but a search needs at least 2. Set data.held_out higher.")
    return first, second, label


def distinct(texts: Sequence[str]) -> tuple[list[str], list[int]]:
    """The distinct texts in order, and each row's number among them."""
    place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    return list(place), [place[text] for text in texts]


@dataclass(frozen=True)
class LabeledItems:
    """N different texts or images and ``label (N,)``, -1 where there is none; ``names`` of the labels, if the source has them.

    They stand in the order of a hash of their content: where an order decides between ties, it must not know the labels.
    """

    items: Sequence[Item]
    label: Tensor
    names: Sequence[str] | None

    def __len__(self) -> int:
        return len(self.items)

    def select(self, which: Tensor) -> "LabeledItems":
        """The chosen ones, by index ``(n,)``."""
        return LabeledItems([self.items[i] for i in which.tolist()], self.label[which], self.names)


def item_hash(item: Item) -> bytes:
    """A hash of the content."""
    return hashlib.blake2b(item.encode() if isinstance(item, str) else item, digest_size=16).digest()


def read_labeled_items(source: Source, suite: str) -> LabeledItems:
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
        mark = item_hash(item)
        first.setdefault(mark, item)
        labels.setdefault(mark, set()).update({int(label)} if label is not None and label >= 0 else ())
    if copies := len(items) - len(first):
        warn_once(f"{suite}: {copies} of {len(items)} items are copies of others and are left out.")
    if torn := sum(len(found) > 1 for found in labels.values()):
        warn_once(f"{suite}: {torn} items are there under several labels; they count as having none.")
    order = sorted(first)
    label = torch.tensor([next(iter(labels[m])) if len(labels[m]) == 1 else -1 for m in order], dtype=torch.long)
    return LabeledItems([first[mark] for mark in order], label, getattr(rows.features["label"], "names", None))


def _item(cell: object, suite: str, number: int) -> Item:
    if isinstance(cell, str):
        return cell
    try:
        return read_image_cell(cell)
    except (OSError, TypeError) as error:
        raise InputError(f"{suite}: the image of row {number} cannot be read: {error}") from error


def match_labels(label: Tensor, names: Sequence[str] | None, reference: LabeledItems, suite: str) -> Tensor:
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


@dataclass(frozen=True)
class EvaluatorGroup:
    """Runs all members and merges what they say."""

    members: Mapping[str, Evaluator]

    def __call__(self, encode: EncodeFunction) -> dict[str, float]:
        """Raises ``InputError`` where two members use one name."""
        metrics: dict[str, float] = {}
        for name, evaluator in self.members.items():
            found = evaluator(encode)
            if twice := metrics.keys() & found.keys():
                raise InputError(f"evaluation.members.{name} measures {', '.join(sorted(twice))} once more. Rename it.")
            metrics |= found
        return metrics

    def table(self, metrics: Mapping[str, float]) -> str:
        """The tables of the members that have one, then what no table holds; of metrics as they were returned."""
        shown = [(name, show(metrics)) for name, e in self.members.items() if (show := getattr(e, "table", None))]
        suites = tuple(f"{name}/" for name, _ in shown)
        rest = [f"{name}  {value:.4f}" for name, value in metrics.items() if not name.startswith(suites)]
        return "\n\n".join([*(text for _, text in shown), *(["\n".join(rest)] if rest else [])])

    def figures(self, encode: EncodeFunction) -> "dict[str, Figure]":
        """Those of the members that draw, as ``<member>_<figure>``; empty if none does."""
        drawn = {name: draw(encode) for name, e in self.members.items() if (draw := getattr(e, "figures", None))}
        return {f"{name}_{key}": figure for name, found in drawn.items() for key, figure in found.items()}
