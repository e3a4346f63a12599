"""What evaluators share: embeddings from any encode function, pairs and labeled items from sources, groups of evaluators."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tercet.errors import InputError
from tercet.images import read_image_cell
from tercet.messages import warn_once
from tercet.types import EncodeFunction, Evaluator, Item, Source

Rows = Source | Mapping[str, Sequence[Any]]  # a source, or columns by name

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def as_embeddings(encode: EncodeFunction, items: Sequence[Item], suite: str | None = None) -> Tensor:
    """Encode ``items``: ``(N, D)`` on the CPU, in float64 where ``encode`` returns float64, else in float32.

    ``encode`` may return a torch tensor on any device or a numpy array, of any type of numbers. ``InputError`` where it does
    not, or where an embedding is not finite and ``suite``, which opens that message, is given.
    """
    found: Any = encode(items)
    try:
        z = found.detach().cpu() if isinstance(found, Tensor) else torch.from_numpy(np.array(found))
    except (TypeError, ValueError) as error:
        raise InputError(f"encode returned {type(found).__name__}: an array of numbers is needed ({error}).") from error
    if z.ndim != 2 or len(z) != len(items):
        raise InputError(f"encode returned shape {tuple(z.shape)} for {len(items)} items: (N, D) is needed.")
    z = z if z.dtype == torch.float64 else z.float()
    if suite is not None and (bad := int((~z.isfinite()).any(1).sum())):
        raise InputError(
            f"{suite}: {bad} of {len(z)} embeddings are not finite (NaN or infinite). The model has diverged, or overflows "
            "in half precision: use another checkpoint or 32-bit precision."
        )
    return z


def encode_unit(encode: EncodeFunction, items: Sequence[Item], suite: str) -> Tensor:
    """Encode to unit vectors ``(N, D)`` in float64; a row of zeros stays 0. Raises ``InputError`` where one is not finite."""
    return F.normalize(as_embeddings(encode, items, suite).double(), dim=-1)


def encode_once(encode: EncodeFunction, texts: Sequence[str], suite: str | None = None) -> Callable[[Sequence[str]], Tensor]:
    """Encode each distinct text once; return a function from some of the texts to their embeddings."""
    unique, _ = distinct(texts)
    row, z = {text: i for i, text in enumerate(unique)}, as_embeddings(encode, unique, suite)
    return lambda some: z[[row[text] for text in some]]


def distinct(texts: Sequence[str]) -> tuple[list[str], list[int]]:
    """Return the distinct texts in order, and each row's index among them."""
    index = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    return list(index), [index[text] for text in texts]


def check_name(suite: str, name: str) -> None:
    """Raise ``InputError`` for a name that metrics cannot carry."""
    if not name or "/" in name:
        raise InputError(f"`name`={name!r}: metrics are called {suite}/<name>/..., so a name without '/' is needed.")


def check_source(suite: str, name: str, source: Rows | None) -> None:
    """Raise ``InputError`` where there is nothing to read, or no usable name for the metrics."""
    check_name(suite, name)
    if source is None:
        raise InputError(
            f"{suite} of {name} needs held-out rows, but `source` is not set: {name} has none. Use other data, or an evaluator "
            "with data of its own, such as STS."
        )


def read_rows(source: Rows) -> tuple[list[str], Any]:
    """The columns of texts or images, and all rows as a ``datasets.Dataset``."""
    if not isinstance(source, Mapping):
        return list(source.columns), source.rows()
    import datasets

    return [name for name in source if name not in ("label", "position")], datasets.Dataset.from_dict(dict(source))


def check_ranks(ks: Sequence[int]) -> None:
    """Raise ``InputError`` unless ``ks`` is a list of ranks."""
    if not ks or any(type(k) is not int or k < 1 for k in ks):
        raise InputError(f"`ks`={ks}: a list of ranks from 1 on, as [1, 10].")


def text_pairs(source: Rows, suite: str) -> tuple[list[str], list[str], list[int]]:
    """Read queries, documents and labels (-1: none), row by row.

    They are the first two columns of the source. Of a source of one column each text is cut at its middle word: the first half
    is the query, the second its document. That needs no label, and a better model finds more of them. Texts of fewer than 4
    words are left out, with a warning.
    """
    columns, rows = read_rows(source)
    label = [int(x) for x in rows["label"]] if "label" in rows.column_names else [-1] * len(rows)
    if len(columns) > 1:
        first, second = list(rows[columns[0]]), list(rows[columns[1]])
    else:
        words = [text.split() for text in rows[columns[0]]]
        long = [i for i, w in enumerate(words) if len(w) >= 4]
        if short := len(words) - len(long):
            warn_once(f"{suite}: {short} of {len(words)} held-out texts have fewer than 4 words and are left out.")
        first = [" ".join(words[i][: len(words[i]) // 2]) for i in long]
        second = [" ".join(words[i][len(words[i]) // 2 :]) for i in long]
        label = [label[i] for i in long]
    if len(first) < 2:
        raise InputError(f"{suite}: {len(first)} held-out pairs, but a search needs at least 2. Set `source.held_out` higher.")
    return first, second, label


@dataclass(frozen=True)
class LabeledItems:
    """N different texts or images and ``label (N,)``, -1 where there is none; ``names`` of the labels, if the source has them.

    They are in the order of a hash of their content, so that an order that decides between ties does not depend on labels.
    """

    items: Sequence[Item]
    label: Tensor
    names: Sequence[str] | None

    def __len__(self) -> int:
        return len(self.items)

    def select(self, which: Tensor) -> "LabeledItems":
        """Select items by index ``(n,)``."""
        return LabeledItems([self.items[i] for i in which.tolist()], self.label[which], self.names)


def item_hash(item: Item) -> bytes:
    """A hash of the content."""
    return hashlib.blake2b(item.encode() if isinstance(item, str) else item, digest_size=16).digest()


def read_labeled_items(source: Rows, suite: str) -> LabeledItems:
    """Read the first column of the source; equal contents are one item, for a copy of the query is found by any model.

    A content with several labels counts as having none. ``suite`` opens messages, as "clustering of trec". ``InputError`` where
    there are no labels, or an image cannot be read.
    """
    (column, *_), rows = read_rows(source)
    if "label" not in rows.column_names:
        has = ", ".join(rows.column_names)
        raise InputError(
            f"{suite} needs labels, but the source has only the columns {has}. Set `source.label`, or use Retrieval."
        )
    items = [_item(cell, suite, number) for number, cell in enumerate(rows[column], start=1)]
    labels: dict[bytes, set[int]] = {}
    first: dict[bytes, Item] = {}
    for item, label in zip(items, rows["label"], strict=True):
        key = item_hash(item)
        first.setdefault(key, item)
        labels.setdefault(key, set()).update({int(label)} if label is not None and label >= 0 else ())
    if copies := len(items) - len(first):
        warn_once(f"{suite}: {copies} of {len(items)} items are copies of others and are left out.")
    if ambiguous := sum(len(found) > 1 for found in labels.values()):
        warn_once(f"{suite}: {ambiguous} items have several labels; they count as having none.")
    order = sorted(first)
    label = torch.tensor([next(iter(labels[key])) if len(labels[key]) == 1 else -1 for key in order], dtype=torch.long)
    return LabeledItems([first[key] for key in order], label, getattr(rows.features["label"], "names", None))


def _item(cell: object, suite: str, number: int) -> Item:
    if isinstance(cell, str):
        return cell
    try:
        return read_image_cell(cell)
    except (OSError, TypeError) as error:
        raise InputError(f"{suite}: the image of row {number} cannot be read: {error}") from error


@dataclass(frozen=True)
class EvaluatorGroup:
    """Runs several evaluators and merges their metrics.

    >>> group = EvaluatorGroup({"length": lambda encode: {"length": float(len(encode(["a"])[0]))}})
    >>> group(lambda items: np.ones((len(items), 3)))
    {'length': 3.0}
    """

    members: Mapping[str, Evaluator]

    def __call__(self, encode: EncodeFunction) -> dict[str, float]:
        """Return the metrics of all members. Raises ``InputError`` where two members use one name."""
        metrics: dict[str, float] = {}
        for name, evaluator in self.members.items():
            found = evaluator(encode)
            if twice := metrics.keys() & found.keys():
                raise InputError(f"`members.{name}` measures {', '.join(sorted(twice))} once more. Give it another name.")
            metrics |= found
        return metrics

    def table(self, metrics: Mapping[str, float]) -> str:
        """Format metrics, named as they were returned: the tables of the members that have one, then the other metrics."""
        tables = [(name, table(metrics)) for name, e in self.members.items() if (table := getattr(e, "table", None))]
        suites = tuple(f"{name}/" for name, _ in tables)
        rest = [f"{name}  {value:.4f}" for name, value in metrics.items() if not name.startswith(suites)]
        return "\n\n".join([*(text for _, text in tables), *(["\n".join(rest)] if rest else [])])

    def figures(self, encode: EncodeFunction) -> "dict[str, Figure]":
        """Draw the figures of the members that have some, named ``<member>_<figure>``."""
        figures = {name: draw(encode) for name, e in self.members.items() if (draw := getattr(e, "figures", None))}
        return {f"{name}_{key}": figure for name, found in figures.items() for key, figure in found.items()}
