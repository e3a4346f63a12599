"""What the page shows of one model, or of two side by side: a map, neighbors, what changed, the worst mistakes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from tercet.errors import check_choice, import_extra, require
from tercet.evaluation.search import nearest
from tercet.images import UnreadableImage, encode_thumbnail, read_image_cell
from tercet.messages import print_status, progress_bar
from tercet.models import CachedEncoder, Encoder
from tercet.serving.service import Service

SAMPLE = 2000  # rows whose neighbors are compared between models, and pairs that are ranked: all of 50,000 take minutes
TOP = 10  # neighbors that are compared
SHOWN = 100  # rows of a list
TSNE_ROWS = 10_000  # more take more than a few minutes
LONGEST = 2000  # characters of a text that are sent to the page
WITHIN = 0.85  # of the way from the middle of a map to its edge lie all points: the title and the buttons are at the edge
BLOCK = 256  # images whose files are held at once


@dataclass(frozen=True)
class Collection:
    """N texts with a label each ("" for none), and pairs ``(P, 2)`` of rows that belong together; there may be none.

    Of images ``texts`` are their names, and ``read_cell`` reads that of a row as ``{"bytes": ..., "path": ...}``, of which
    either may be None: no more than a few are in memory. ``part`` says of how many they are some, as " of 600 texts".
    """

    texts: Sequence[str]
    labels: Sequence[str]
    pairs: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 2), dtype=np.int64))
    read_cell: Callable[[int], Mapping[str, Any]] | None = None
    part: str = ""

    @classmethod
    def of_columns(
        cls, columns: Mapping[str, Sequence[str]], labels: Sequence[str] | None = None, limit: int = 50_000
    ) -> "Collection":
        """The texts of all columns, at most ``limit``, of rows spread evenly; two columns are pairs.

        Without ``labels`` of the rows a text has the name of its column, if there are several.

        >>> made = Collection.of_columns({"old": ["a", "b"], "new": ["A", "B"]})
        >>> made.texts, made.labels, made.pairs.tolist()
        (['a', 'b', 'A', 'B'], ['old', 'old', 'new', 'new'], [[0, 2], [1, 3]])
        """
        count = len(next(iter(columns.values())))
        require(count, "There are no texts.")
        rows = spread(count, max(1, limit // len(columns)))
        texts = [column[row] for column in columns.values() for row in rows]
        named = [name if len(columns) > 1 else "" for name in columns for _ in rows]
        given = [labels[row] for _ in columns for row in rows] if labels is not None else named
        first = np.arange(len(rows))
        pairs = np.stack([first, first + len(rows)], 1) if len(columns) > 1 else np.zeros((0, 2), dtype=np.int64)
        return cls(texts, given, pairs)


def spread(count: int, limit: int) -> list[int]:
    """At most ``limit`` of ``count`` rows, spread evenly.

    >>> spread(7, 3)
    [0, 3, 6]
    """
    return cast(list[int], np.unique(np.linspace(0, count - 1, min(count, limit)).round().astype(int)).tolist())


@dataclass(frozen=True)
class View:
    """A model's vectors of a collection, unit rows ``z (N, D)``, their map ``(N, 2)``, and what encodes a query; or None."""

    name: str
    z: Tensor
    map: NDArray[np.float32]
    service: Service | None = None


def make_view(name: str, z: Tensor, service: Service | None = None, method: str = "pca", first: View | None = None) -> View:
    """The view of vectors ``(N, D)``; its map is turned, or with t-SNE begun, so as to be compared with that of ``first``."""
    check_choice("projection", method, ("pca", "tsne"))
    z = normalize(z.float(), dim=1)
    plane = project(z)
    if first is not None:  # of all rotations and reflections the one that brings the points closest
        u, _, v = torch.linalg.svd(plane.T @ torch.from_numpy(first.map))
        plane = plane @ u @ v
    if method == "tsne" and len(z) > 3:
        advice = f"The projection tsne is for {TSNE_ROWS} points or fewer, here are {len(z)}: use pca, or fewer points."
        require(len(z) <= TSNE_ROWS, advice)
        start = plane.numpy() if first is None else first.map
        settings = {"init": start / start.std() * 1e-4, "perplexity": min(30.0, (len(z) - 1) / 3), "random_state": 0}
        plane = torch.from_numpy(import_extra("sklearn.manifold", "app").TSNE(**settings).fit_transform(z.numpy()))
    largest = plane.abs().max().clamp(min=1e-9)
    return View(name, z, (plane / largest * WITHIN).numpy().astype(np.float32), service)


def encode_collection(model: Encoder, collection: Collection) -> Tensor:
    """``(N, D)``: the second text of a pair with the prompt of documents; rows of NaN are images that cannot be read."""
    is_image = collection.read_cell is not None
    expected = "images are for a model of images, and texts for one of texts"
    require(is_image == (model.kind == "image"), f"`model` does not read what `collection` holds: {expected}.")
    if collection.read_cell is not None:
        return _encode_images(model, collection.read_cell, len(collection.texts))
    encode = CachedEncoder(model, distributed=False, progress="embedding")
    if not len(collection.pairs):
        return encode(collection.texts)
    half = int(collection.pairs[0, 1])
    return torch.cat([encode.for_column(i)(part) for i, part in enumerate((collection.texts[:half], collection.texts[half:]))])


def _encode_images(model: Encoder, read_cell: Callable[[int], Mapping[str, Any]], count: int) -> Tensor:
    from tercet.search.encoding import encode_readable  # not above: a server of texts has no need of it

    blocks = []
    with progress_bar("embedding", count, model.unit) as bar:
        for start in range(0, count, BLOCK):
            cells = [read_cell(row) for row in range(start, min(start + BLOCK, count))]
            blocks.append(torch.from_numpy(encode_readable(model, cells)))
            bar.update(len(cells))
    return torch.cat(blocks)


def keep_readable(collection: Collection, vectors: Sequence[Tensor]) -> tuple[Collection, list[Tensor]]:
    """Leave out images that a model could not read; ``vectors (N, D)`` are those of ``encode_collection``, by each model."""
    readable = torch.stack([z.isfinite().all(1) for z in vectors]).all(0)
    rows, read_cell = readable.nonzero().flatten().tolist(), collection.read_cell
    if read_cell is None or len(rows) == len(readable):
        return collection, list(vectors)
    require(rows, "`collection`: none of the images can be read.")
    print_status(f"{len(readable) - len(rows)} of {len(readable)} images cannot be used and are left out.")
    texts, labels = ([values[row] for row in rows] for values in (collection.texts, collection.labels))
    kept = Collection(texts, labels, read_cell=lambda row: read_cell(rows[row]), part=collection.part)
    return kept, [z[readable] for z in vectors]


def project(z: Tensor) -> Tensor:
    """The first two principal components ``(N, 2)``; the sign makes the largest value of each positive."""
    centered = z - z.mean(0)
    axes = np.linalg.eigh((centered.T @ centered).numpy()).eigenvectors  # torch's does not converge on some CPUs (transfer.py)
    plane: Tensor = centered @ torch.from_numpy(axes[:, -2:]).flip(1)
    plane = torch.nn.functional.pad(plane, (0, 2 - plane.shape[1]))  # of vectors of one column
    sign = plane.gather(0, plane.abs().argmax(0, keepdim=True)).sign()
    plane *= torch.where(sign == 0, 1.0, sign)
    return plane


class Explorer:
    """A collection as one or two models see it."""

    def __init__(self, collection: Collection, views: Sequence[View]) -> None:
        require(1 <= len(views) <= 2, "One model or two are shown.")
        sizes = {len(collection.texts), len(collection.labels), *(len(view.z) for view in views)}
        require(len(sizes) == 1, f"Each text has a label and a vector; here are {sorted(sizes)}.")
        self.collection, self.views = collection, list(views)

    @cached_property
    def label_names(self) -> list[str]:
        """The labels, the most frequent first."""
        names, counts = np.unique(np.array(self.collection.labels, dtype=object).astype(str), return_counts=True)
        return [str(names[i]) for i in np.argsort(-counts, kind="stable")]

    def points(self, number: int) -> bytes:
        """x, y and the number of the label of every row, as float32 one after the other: ``(N, 3)``."""
        place = {name: i for i, name in enumerate(self.label_names)}
        label = np.array([place[name] for name in self.collection.labels], dtype=np.float32)
        return np.column_stack([self.views[number].map, label]).astype("<f4").tobytes()

    def item(self, row: int) -> dict[str, Any]:
        """What the page shows of a row."""
        return {"row": row, "text": self.collection.texts[row][:LONGEST], "label": self.collection.labels[row]}

    def thumbnail(self, row: int) -> bytes | None:
        """The image of a row as a small JPEG file, read anew; None without images, or where it cannot be read any more."""
        if self.collection.read_cell is None:
            return None
        try:
            return encode_thumbnail(read_image_cell(self.collection.read_cell(row)))
        except (UnreadableImage, OSError):
            return None

    def neighbors(self, queries: Sequence[Tensor], own: int = -1, k: int = TOP) -> list[list[dict[str, Any]]]:
        """The ``k`` nearest rows of a query, given as each model's vector ``(D,)``; ``own`` is the row that is the query.

        Of two models, each hit says whether the other has it among its own ``k``.
        """
        found = []
        for view, query in zip(self.views, queries, strict=True):
            scores, rows = nearest(normalize(query[None], dim=1), view.z, k, own=torch.tensor([own]))
            found.append([(row, score) for row, score in zip(rows[0].tolist(), scores[0].tolist(), strict=True) if row >= 0])
        others = [{row for row, _ in hits} for hits in reversed(found)] if len(found) == 2 else [set(), set()]
        return [
            [{**self.item(row), "score": score, "shared": len(found) == 1 or row in other} for row, score in hits]
            for hits, other in zip(found, others, strict=False)
        ]

    @cached_property
    def changed(self) -> list[dict[str, Any]]:
        """Of a sample of rows those whose ``TOP`` neighbors differ most between two models: how many they share."""
        count = len(self.collection.texts)
        if len(self.views) < 2 or count < 2:
            return []
        rows = torch.linspace(0, count - 1, min(count, SAMPLE)).round().long().unique()
        first, second = (nearest(view.z[rows], view.z, TOP, own=rows)[1] for view in self.views)
        shared = ((first[:, :, None] == second[:, None]) & (first[:, :, None] >= 0)).sum((1, 2))
        order = shared.argsort(stable=True)[:SHOWN].tolist()
        return [{**self.item(int(rows[i])), "shared": int(shared[i]), "of": min(TOP, count - 1)} for i in order]

    @cached_property
    def mistakes(self) -> list[list[dict[str, Any]]]:
        """For each model the pairs, of a sample, whose second text is found latest; with labels, the most wrong neighbors."""
        return [self._ranked_pairs(view.z) if len(self.collection.pairs) else self._wrong_labels(view.z) for view in self.views]

    def _ranked_pairs(self, z: Tensor) -> list[dict[str, Any]]:
        pairs = torch.from_numpy(self.collection.pairs)
        some = pairs[torch.linspace(0, len(pairs) - 1, min(len(pairs), SAMPLE)).round().long().unique()]
        keys, found = z[pairs[:, 1]], []
        texts = [self.collection.texts[int(row)] for row in pairs[:, 1]]
        for anchor, own in some.tolist():
            scores = keys @ z[anchor]
            true = float(z[own] @ z[anchor])
            best = int(scores.argmax())
            if texts[best] != self.collection.texts[own]:  # the same text may stand in several rows
                rank = int((scores > true).sum()) + 1
                found.append((rank, anchor, own, int(pairs[best, 1]), true, float(scores[best])))
        found.sort(key=lambda row: (-row[0], row[1]))
        return [self._mistake(rank, anchor, own, best, true, score) for rank, anchor, own, best, true, score in found[:SHOWN]]

    def _mistake(self, rank: int | None, query: int, right: int, wrong: int, true: float, score: float) -> dict[str, Any]:
        """What the page shows of a query, the row that is right with its score ``true``, and one that was found before it."""
        both = {"right": {**self.item(right), "score": true}, "wrong": {**self.item(wrong), "score": score}}
        return {"rank": rank, "query": self.item(query), **both}

    def _wrong_labels(self, z: Tensor) -> list[dict[str, Any]]:
        labels = np.array(self.collection.labels, dtype=object)
        named = np.flatnonzero(labels != "")
        if len(self.label_names) < 2 or not len(named):
            return []
        codes = torch.tensor([self.label_names.index(name) if name else -1 for name in labels])
        found = []
        for row in named[spread(len(named), SAMPLE)].tolist():
            scores = z @ z[row]
            scores[row] = -torch.inf
            same = (codes == codes[row]).logical_and(scores > -torch.inf)
            wrong = scores.masked_fill((codes == codes[row]) | (codes < 0), -torch.inf)
            if same.any() and float(gap := wrong.max() - scores.masked_fill(~same, -torch.inf).max()) > 0:
                found.append((float(gap), row, int(scores.masked_fill(~same, -torch.inf).argmax()), int(wrong.argmax())))
        found.sort(reverse=True)
        rows = ((row, right, best, *(float(z[i] @ z[row]) for i in (right, best))) for _, row, right, best in found[:SHOWN])
        return [self._mistake(None, *each) for each in rows]
