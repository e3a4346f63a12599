"""Plots of embeddings while training."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor

from tercet.distributed.gather import world_size
from tercet.images import UnreadableImage, make_thumbnail, read_image_cell
from tercet.models import Encoder, ImageEncoder
from tercet.training.callbacks.figures import publish_figure, publish_table
from tercet.training.contrastive import Contrastive
from tercet.types import Item, Source

TRUE, OTHER = "#1b7f79", "#b5bcbf"
COLORS = 10  # labels that get a color of their own; the rest are grey


@dataclass(frozen=True)
class EmbeddedSample:
    """Unit rows ``z (V, N, D)`` of held-out examples and their ``label (N,)``, -1 where unknown."""

    z: Tensor
    label: Tensor

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Cosines of true pairs (two views of an example, else equal labels) and of all others."""
        n = len(self.label)
        if len(self.z) > 1:
            scores = self.z[0] @ self.z[1].T
            true = torch.eye(n, dtype=torch.bool)
        else:
            scores = self.z[0] @ self.z[0].T
            true = (self.label[:, None] == self.label) & (self.label[:, None] >= 0)
            true = true.triu(1)
        other = ~true & ~torch.eye(n, dtype=torch.bool)
        return scores[true], scores[other]

    def notable(self, count: int) -> list[tuple[str, float, int, int]]:
        """The true pairs that are farthest, the others that are nearest, and the first rows' nearest.

        (what, cosine, row of the first view, row of the last).
        """
        scores = self.z[0] @ self.z[-1].T
        n = len(scores)
        own = torch.eye(n, dtype=torch.bool)
        same = own if len(self.z) > 1 else (self.label[:, None] == self.label) & (self.label[:, None] >= 0) & ~own
        other = (~same & ~own).triu(1) if len(self.z) == 1 else ~same & ~own
        found = []
        for what, mask, least in (("hardest positive", same, True), ("hardest negative", other, False)):
            at = mask.nonzero()
            order = scores[mask].argsort(descending=not least)[:count]
            found += [(what, float(scores[i, j]), i, j) for i, j in at[order].tolist()]
        nearest = scores.masked_fill(own, -2.0) if len(self.z) == 1 else scores
        return found + [("nearest", float(x), i, int(j)) for i, (x, j) in enumerate(zip(*nearest[:count].max(1), strict=True))]

    def triplets(self, count: int) -> list[tuple[int, int, int, float, float]]:
        """Anchors a with their farthest positive p and nearest negative n: (a, p, n, cosine of a and p, of a and n).

        The worst first: those whose negative is nearer than their positive by most.
        """
        scores = self.z[0] @ self.z[-1].T
        own = torch.eye(len(scores), dtype=torch.bool)
        known = self.label >= 0
        same = (self.label[:, None] == self.label) & known[:, None]
        same = same | own if len(self.z) > 1 else same & ~own
        far, p = scores.masked_fill(~same, 2.0).min(1)
        near, n = scores.masked_fill(same | own, -2.0).max(1)
        worst = (near - far).masked_fill(~same.any(1), -9.0).argsort(descending=True)[:count].tolist()
        return [(a, int(p[a]), int(n[a]), float(far[a]), float(near[a])) for a in worst if same[a].any()]

    def spread(self) -> tuple[float, float]:
        """Alignment over true pairs (0 without any) and uniformity (Wang and Isola 2020, eq. 1 and 2)."""
        true, _ = self.pairs()
        close = float((2 - 2 * true).mean()) if len(true) else 0.0
        scores = self.z[0] @ self.z[0].T
        off = ~torch.eye(len(scores), dtype=torch.bool)
        return close, float((4 * (scores[off] - 1)).exp().mean().log())

    def spectrum(self) -> Tensor:
        """Singular values of the centred rows, the largest is 1: those of a collapsed space fall at once."""
        values = torch.linalg.svdvals(self.z[0] - self.z[0].mean(0))
        shares: Tensor = values / values[0].clamp(min=1e-12)
        return shares[: len(self.label) - 1]  # centred rows have no more directions

    def plane(self) -> Tensor:
        """``(N, 2)``: the two directions in which the rows differ most (PCA)."""
        centred = self.z[0] - self.z[0].mean(0)
        place: Tensor = centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:2].T
        return place


def draw_embeddings(sample: EmbeddedSample, path: list[tuple[str, float, float]], umap: bool) -> Figure:
    """Four panels."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    space, pairs, spectrum, way = figure.subplots(2, 2).flat
    place, how = _placed(sample, umap)
    shown = sample.label.unique(return_counts=True)
    known = shown[0][shown[0] >= 0]
    chosen = known[shown[1][shown[0] >= 0].argsort(descending=True)][:COLORS]
    rest = ~torch.isin(sample.label, chosen)
    space.scatter(*place[rest].T.tolist(), s=9, color=OTHER if len(chosen) else TRUE, alpha=0.6, linewidths=0)
    for i, label in enumerate(chosen.tolist()):
        space.scatter(*place[sample.label == label].T.tolist(), s=14, color=f"C{i}", linewidths=0, label=str(label))
    if len(chosen):
        space.legend(frameon=False, fontsize="small", title="label")
    space.set(title=f"Map ({how}), {len(place)} held-out rows", xticks=[], yticks=[])
    true, other = sample.pairs()
    bins = torch.linspace(-1, 1, 81).tolist()
    pairs.hist(other.tolist(), bins=bins, density=True, color=OTHER, label="other pairs")
    if len(true):
        pairs.hist(true.tolist(), bins=bins, density=True, color=TRUE, alpha=0.75, label="true pairs")
    pairs.set(title="Similarity", xlabel="cosine", yticks=[])
    pairs.legend(frameon=False)
    values = sample.spectrum()
    spectrum.plot(range(1, len(values) + 1), values.clamp(min=1e-6).tolist(), color=TRUE)
    spectrum.set(title="Singular values (a collapse falls at once)", yscale="log", ylim=(1e-4, 1.5), xlabel="direction")
    names, aligned, uniform = zip(*path, strict=True)
    way.plot(uniform, aligned, "-o", color=TRUE, ms=4)
    for i in {0, len(path) - 1}:
        way.annotate(names[i], (uniform[i], aligned[i]), (5, 5), textcoords="offset points")
    way.set(title="Alignment and uniformity (both: less is better)", xlabel="uniformity", ylabel="alignment")
    for axis in (space, pairs, spectrum, way):
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def _placed(sample: EmbeddedSample, umap: bool) -> tuple[Tensor, str]:
    if umap:
        from umap import UMAP

        return torch.as_tensor(UMAP(metric="cosine", random_state=0).fit_transform(sample.z[0].numpy())), "UMAP"
    return sample.plane(), "PCA"


def draw_triplets(triplets: Sequence[tuple[int, int, int, float, float]], images: Sequence[bytes]) -> Figure:
    """A row each triplet: anchor, positive, negative, and their cosines to the anchor."""
    figure = Figure(figsize=(5.4, 1.6 * max(1, len(triplets))), layout="constrained")
    axes: Any = figure.subplots(max(1, len(triplets)), 3, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for row, (a, p, n, far, near) in zip(axes, triplets, strict=False):
        titles = ("anchor", f"positive {far:.2f}", f"negative {near:.2f}")
        for axis, which, title in zip(row, (a, p, n), titles, strict=True):
            axis.imshow(make_thumbnail(images[which]))
            axis.set_title(title, fontsize=8)
    return figure


class Embeddings(pl.Callback):
    """Draws ``rows`` held-out examples of ``source`` before training, every ``every`` steps, and at the end.

    ``embeddings.png``; ``pairs.csv``, the ``pairs`` hardest positives, negatives and nearest neighbours, and ``triplets.csv``,
    the anchors whose farthest positive and nearest negative are in the wrong order most; of images ``triplets.png``. All in
    the run's folder and in every logger; W&B has both tables with pictures, TensorBoard's projector the last vectors. null for
    ``every``: before and at the end alone. Map: UMAP where the package umap-learn is installed and ``umap`` asks for it,
    else PCA. In several processes nothing is drawn between the steps: the others would wait.
    """

    def __init__(self, source: Source | None, rows: int, pairs: int, every: int | None, umap: bool) -> None:
        self.source = source
        self.rows = rows
        self.pairs = pairs
        self.every = every
        self.umap = umap
        self.path: list[tuple[str, float, float]] = []
        self.items: list[list[Any]] | None = None
        self.label = torch.zeros(0, dtype=torch.long)

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: pl.Trainer, pl_module: Contrastive, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Every ``every`` steps."""
        if self.every and trainer.global_step % self.every == 0 and world_size() == 1:
            pl_module.on_validation_epoch_start()
            self._draw(trainer, pl_module, f"step {trainer.global_step}")

    def on_test_end(self, trainer: pl.Trainer, pl_module: Contrastive) -> None:  # type: ignore[override]
        """Before training, and at its end."""
        self._draw(trainer, pl_module, str(pl_module.stage))

    def _draw(self, trainer: pl.Trainer, pl_module: Contrastive, when: str) -> None:
        if self.source is None or not self._read(pl_module.encoder):
            return
        assert self.items is not None
        z = torch.stack([F.normalize(pl_module.cached_encoder(column), dim=-1) for column in self.items])
        sample = EmbeddedSample(z.float(), self.label)
        self.path.append((when, *sample.spread()))
        if when != "before" and trainer.is_global_zero:
            publish_figure(trainer, "embeddings", draw_embeddings(sample, self.path, self.umap))
            self._show(trainer, sample)
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger) and when == "test":
                    said = [str(item)[:100] if isinstance(item, str) else str(i) for i, item in enumerate(self.items[0])]
                    logger.experiment.add_embedding(z[0], metadata=said, global_step=trainer.global_step)

    def _show(self, trainer: pl.Trainer, sample: EmbeddedSample) -> None:
        assert self.items is not None
        triplets = sample.triplets(self.pairs)
        one, other = self.items[0], self.items[-1]
        if isinstance(one[0], bytes):
            publish_figure(trainer, "triplets", draw_triplets(triplets, one))
        pairs = [(what, round(cosine, 4), one[i], other[j]) for what, cosine, i, j in sample.notable(self.pairs)]
        publish_table(trainer, "pairs", ("what", "cosine", "one", "other"), pairs)
        hard = [(round(far, 4), round(near, 4), one[a], other[p], other[n]) for a, p, n, far, near in triplets]
        if hard:
            publish_table(trainer, "triplets", ("to positive", "to negative", "anchor", "positive", "negative"), hard)

    def _read(self, encoder: Encoder) -> bool:
        """The columns of a few rows, those with an image that cannot be used left out; false where there are too few."""
        if self.items is None:
            assert self.source is not None
            table = self.source.rows()
            table = table.shuffle(seed=0).select(range(min(self.rows, len(table))))
            columns = list(self.source.columns)[:2]
            cells = [list(table[name]) for name in columns]
            items = [[cell if isinstance(cell, str) else read_image_cell(cell) for cell in column] for column in cells]
            kept = [i for i, row in enumerate(zip(*items, strict=True)) if all(is_readable(encoder, item) for item in row)]
            self.items = [[column[i] for i in kept] for column in items]
            if "label" in table.column_names:
                self.label = torch.as_tensor(table["label"])[kept]
            else:
                self.label = torch.full((len(kept),), -1)
        return len(self.items[0]) > 2


def is_readable(encoder: Encoder, item: Item) -> bool:
    """Whether the encoder can read it."""
    if not isinstance(encoder, ImageEncoder) or isinstance(item, str):
        return True
    try:
        encoder.pixels.open(item)
    except UnreadableImage:
        return False
    return True
