"""A few held-out examples as a model sees them, and pictures of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from tercet.image import thumbnail

TRUE, OTHER = "#1b7f79", "#b5bcbf"
COLORS = 10  # labels that get a color of their own; the rest are grey


@dataclass(frozen=True)
class Sample:
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
        return found + [
            ("nearest", float(x), i, int(j)) for i, (x, j) in enumerate(zip(*nearest[:count].max(1), strict=True))
        ]

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


def draw(sample: Sample, path: list[tuple[str, float, float]], umap: bool) -> Figure:
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


def _placed(sample: Sample, umap: bool) -> tuple[Tensor, str]:
    if umap:
        from umap import UMAP

        return torch.as_tensor(UMAP(metric="cosine", random_state=0).fit_transform(sample.z[0].numpy())), "UMAP"
    return sample.plane(), "PCA"


def sheet(triplets: Sequence[tuple[int, int, int, float, float]], images: Sequence[bytes]) -> Figure:
    """A row each triplet: anchor, positive, negative, and their cosines to the anchor."""
    figure = Figure(figsize=(5.4, 1.6 * max(1, len(triplets))), layout="constrained")
    axes: Any = figure.subplots(max(1, len(triplets)), 3, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for row, (a, p, n, far, near) in zip(axes, triplets, strict=False):
        titles = ("anchor", f"positive {far:.2f}", f"negative {near:.2f}")
        for axis, which, title in zip(row, (a, p, n), titles, strict=True):
            axis.imshow(thumbnail(images[which]))
            axis.set_title(title, fontsize=8)
    return figure
