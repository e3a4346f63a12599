"""Figures and tables of the embeddings of held-out rows, during training."""

from collections.abc import Sequence
from typing import Any, cast

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from tercet.distributed.gather import world_size
from tercet.evaluation.figures import ACCENT, make_axes
from tercet.images import UnreadableImage, make_thumbnail, read_image_cell
from tercet.messages import printable
from tercet.models import Encoder, ImageEncoder
from tercet.training.callbacks.evaluation import refresh_encoder
from tercet.training.callbacks.figures import OTHER_COLOR, draw_cosines, publish_figure, publish_table
from tercet.training.loggers import EMBEDDINGS, log_to_all
from tercet.types import Item, Source

MAX_COLORS = 10  # labels with a color of their own; all others are gray


class EmbeddedSample:
    """Unit rows ``z (V, N, D)`` of held-out examples, of one or two views, and their ``label (N,)``, -1 where unknown.

    True pairs are two views of an example or, of one view, two rows of one label; all others are false pairs. ``scores (N, N)``
    are the cosines of row i of the first view and row j of the last.
    """

    def __init__(self, z: Tensor, label: Tensor) -> None:
        self.z, self.label, self.two_views = z, label, len(z) > 1
        self.scores = z[0] @ z[-1].T
        self.own = torch.eye(len(label), dtype=torch.bool)
        self.same_label = (label[:, None] == label) & (label[:, None] >= 0)
        # Pairs of rows of one view come once; the row itself is no pair.
        self.true = self.own if self.two_views else self.same_label.triu(1)
        self.false = ~self.own if self.two_views else (~self.same_label).triu(1)

    def pairs(self) -> tuple[Tensor, Tensor]:
        """The cosines of true pairs and of false pairs."""
        return self.scores[self.true], self.scores[self.false]

    def notable(self, count: int) -> list[tuple[str, float, int, int]]:
        """The ``count`` true pairs that are farthest, false pairs that are nearest, and nearest rows of the first rows.

        Each is (kind, cosine, row of the first view, row of the last).
        """
        found = []
        for kind, mask, least in (("hardest positive", self.true, True), ("hardest negative", self.false, False)):
            order = self.scores[mask].argsort(descending=not least)[:count]
            found += [(kind, float(self.scores[i, j]), i, j) for i, j in mask.nonzero()[order].tolist()]
        nearest, at = (self.scores if self.two_views else self.scores.masked_fill(self.own, -2.0))[:count].max(1)
        return found + [("nearest", float(x), i, int(j)) for i, (x, j) in enumerate(zip(nearest, at, strict=True))]

    def triplets(self, count: int) -> list[tuple[int, int, int, float, float]]:
        """Anchors a with their farthest positive p and nearest negative n: (a, p, n, cosine of a and p, of a and n).

        The worst first: those whose negative is nearer than their positive by most.
        """
        same = self.same_label | self.own if self.two_views else self.same_label & ~self.own
        far, p = self.scores.masked_fill(~same, 2.0).min(1)
        near, n = self.scores.masked_fill(same | self.own, -2.0).max(1)
        worst = (near - far).masked_fill(~same.any(1), -9.0).argsort(descending=True)[:count].tolist()
        return [(a, int(p[a]), int(n[a]), float(far[a]), float(near[a])) for a in worst if same[a].any()]

    def spread(self) -> tuple[float, float]:
        """Alignment of true pairs, 0 without any, and uniformity (Wang and Isola 2020, eq. 1 and 2); lower is better."""
        true, _ = self.pairs()
        others = (self.z[0] @ self.z[0].T)[~self.own]
        return float((2 - 2 * true).mean()) if len(true) else 0.0, float((4 * (others - 1)).exp().mean().log())

    def spectrum(self) -> Tensor:
        """Singular values of the centered rows over the largest: they fall steeply where the embeddings have collapsed."""
        values = torch.linalg.svdvals(self.z[0] - self.z[0].mean(0))
        ratios: Tensor = values / values[0].clamp(min=1e-12)
        return ratios[: len(self.label) - 1]  # N centered rows span N - 1 directions

    def plane(self) -> Tensor:
        """``(N, 2)``: the first two principal components of the rows."""
        centered = self.z[0] - self.z[0].mean(0)
        return cast(Tensor, centered @ torch.linalg.svd(centered, full_matrices=False).Vh[:2].T)


def draw_embeddings(sample: EmbeddedSample, history: list[tuple[str, float, float]], umap: bool) -> Figure:
    """Four panels: a map of the rows, cosines of pairs, singular values, and alignment over uniformity since the start."""
    figure, (space, cosines, spectrum, progress) = make_axes(11, 8, 2, 2)
    _draw_map(space, sample, umap)
    draw_cosines(cosines, "Similarity", *sample.pairs(), -1)
    cosines.legend(frameon=False)
    values = sample.spectrum()
    spectrum.plot(range(1, len(values) + 1), values.clamp(min=1e-6).tolist(), color=ACCENT)
    spectrum.set(title="Singular values (a collapse falls at once)", yscale="log", ylim=(1e-4, 1.5), xlabel="direction")
    names, aligned, uniform = zip(*history, strict=True)
    progress.plot(uniform, aligned, "-o", color=ACCENT, ms=4)
    for i in {0, len(history) - 1}:
        progress.annotate(names[i], (uniform[i], aligned[i]), (5, 5), textcoords="offset points")
    progress.set(title="Alignment and uniformity (both: less is better)", xlabel="uniformity", ylabel="alignment")
    return figure


def _draw_map(axis: Any, sample: EmbeddedSample, umap: bool) -> None:
    points, method = sample.plane(), "PCA"
    if umap:
        from umap import UMAP

        points, method = torch.as_tensor(UMAP(metric="cosine", random_state=0).fit_transform(sample.z[0].numpy())), "UMAP"
    labels, counts = sample.label.unique(return_counts=True)
    frequent = labels[labels >= 0][counts[labels >= 0].argsort(descending=True)][:MAX_COLORS]
    rest = ~torch.isin(sample.label, frequent)
    axis.scatter(*points[rest].T.tolist(), s=9, color=OTHER_COLOR if len(frequent) else ACCENT, alpha=0.6, linewidths=0)
    for i, label in enumerate(frequent.tolist()):
        axis.scatter(*points[sample.label == label].T.tolist(), s=14, color=f"C{i}", linewidths=0, label=str(label))
    if len(frequent):
        axis.legend(frameon=False, fontsize="small", title="label")
    axis.set(title=f"Map ({method}), {len(points)} held-out rows", xticks=[], yticks=[])


def draw_triplets(triplets: Sequence[tuple[int, int, int, float, float]], images: Sequence[bytes]) -> Figure:
    """One row per triplet: the images of anchor, positive and negative, with their cosines to the anchor."""
    figure = Figure(figsize=(5.4, 1.6 * max(1, len(triplets))), layout="constrained")
    axes: Any = figure.subplots(max(1, len(triplets)), 3, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for row, (a, p, n, far, near) in zip(axes, triplets, strict=False):
        titles = {"anchor": a, f"positive {far:.2f}": p, f"negative {near:.2f}": n}
        for axis, (title, which) in zip(row, titles.items(), strict=True):
            axis.imshow(make_thumbnail(images[which]))
            axis.set_title(title, fontsize=8)
    return figure


class EmbeddingFigures(pl.Callback):
    """Embed ``rows`` held-out examples of ``source`` before training, every ``every`` steps and at the end, and show them.

    Written into the run's folder and logged: ``embeddings.png``; ``pairs.csv``, the ``pairs`` hardest positives, hardest
    negatives and nearest neighbors; ``triplets.csv``, the anchors whose negative is nearer than their positive by most; and
    ``triplets.png`` of images. W&B has the tables with pictures, TensorBoard's projector the last embeddings. Several processes
    draw at the end only. The map is a PCA, or UMAP with ``umap``, which needs the package umap-learn.
    """

    def __init__(
        self, source: Source | None = None, rows: int = 500, pairs: int = 10, every: int | None = None, umap: bool = False
    ) -> None:
        self.source, self.rows, self.pairs = source, rows, pairs
        self.every, self.umap = every, umap
        self.history: list[tuple[str, float, float]] = []
        self.items: list[list[Any]] = []  # one or two columns, once loaded
        self.label = torch.zeros(0, dtype=torch.long)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Draw every ``every`` steps, in a single process."""
        if self.every and trainer.global_step % self.every == 0 and world_size() == 1:
            refresh_encoder(trainer, pl_module)
            self._draw(trainer, pl_module, f"step {trainer.global_step}")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw before training and at its end."""
        self._draw(trainer, pl_module, str(pl_module.stage))

    def _draw(self, trainer: pl.Trainer, module: Any, when: str) -> None:
        if self.source is None:
            return
        if not self.items:
            self._load_items(self.source, module.encoder)
        if len(self.items[0]) < 3:
            return
        encode: Any = module.cached_encoder  # with each column's prompt
        z = torch.stack([F.normalize(encode.for_column(i)(column), dim=-1) for i, column in enumerate(self.items)])
        sample = EmbeddedSample(z.float(), self.label)
        self.history.append((when, *sample.spread()))
        if when != "before" and trainer.is_global_zero:
            publish_figure(trainer, "embeddings", draw_embeddings(sample, self.history, self.umap))
            self._publish_tables(trainer, sample)
            if when == "test":
                items = enumerate(self.items[0])
                names = [printable(x[:100], lines=False) if isinstance(x, str) else str(i) for i, x in items]
                log_to_all(trainer, EMBEDDINGS, z[0], names)

    def _load_items(self, source: Source, encoder: Encoder) -> None:
        """Load the rows, without those of unreadable images."""
        table = source.rows()
        table = table.shuffle(seed=0).select(range(min(self.rows, len(table))))
        cells = [list(table[name]) for name in list(source.columns)[:2]]
        items = [[read_item(encoder, cell) for cell in column] for column in cells]
        kept = [i for i, row in enumerate(zip(*items, strict=True)) if None not in row]
        self.items = [[column[i] for i in kept] for column in items]
        labeled = "label" in table.column_names
        self.label = torch.as_tensor(table["label"])[kept] if labeled else torch.full((len(kept),), -1)

    def _publish_tables(self, trainer: pl.Trainer, sample: EmbeddedSample) -> None:
        one, other = self.items[0], self.items[-1]
        triplets = sample.triplets(self.pairs)
        if isinstance(one[0], bytes):
            publish_figure(trainer, "triplets", draw_triplets(triplets, one))
        pairs = [(kind, round(cosine, 4), one[i], other[j]) for kind, cosine, i, j in sample.notable(self.pairs)]
        publish_table(trainer, "pairs", ("what", "cosine", "one", "other"), pairs)
        hard = [(round(far, 4), round(near, 4), one[a], other[p], other[n]) for a, p, n, far, near in triplets]
        if hard:
            publish_table(trainer, "triplets", ("to positive", "to negative", "anchor", "positive", "negative"), hard)


def read_item(encoder: Encoder, cell: Any) -> Item | None:
    """The text of a cell, or the bytes of its image; None for an image that cannot be read, or that the encoder cannot open."""
    if isinstance(cell, str):
        return cell
    try:
        image = read_image_cell(cell)
        if isinstance(encoder, ImageEncoder):
            encoder.pixels.open(image)
    except (UnreadableImage, OSError):
        return None
    return image
