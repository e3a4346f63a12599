"""Figures of evaluations: import when one is drawn, since evaluators also run without matplotlib."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from tercet.evaluation.inputs import Bools, Floats
from tercet.evaluation.verification import FacePairs, Roc
from tercet.images import make_thumbnail
from tercet.messages import printable

ACCENT, GRAY, DARK = "#1b7f79", "#888888", "#333333"
FACE_SIZE = 128  # pixels of a face on the sheet of errors


def plot_roc(curve: Roc, far: float) -> Figure:
    """Plot VAL over FAR on a logarithmic axis, with VAL at ``far`` marked."""
    figure, (axis,) = make_axes(5.2, 4.2)
    least = 1 / (2 * curve.different)  # stands for a FAR of 0, which a logarithmic axis does not have
    x = np.maximum(curve.far, least)
    val, reached = curve.val_at(far)
    axis.plot(x, x, color=GRAY, lw=1, ls="--", label="chance")
    axis.plot(x, curve.val, color=ACCENT, lw=2.2, drawstyle="steps-post")
    axis.axvline(far, color=GRAY, lw=0.8, ls=":")
    label = f"VAL {100 * val:.1f} % at FAR {reached:.2g}"
    axis.plot([max(reached, least)], [val], "o", color=ACCENT, ms=7, mec="white", clip_on=False, zorder=5, label=label)
    corner = "upper left" if val < 0.5 else "lower right"  # where the curve is not
    axis.legend(frameon=False, loc=corner, title=f"AUC {curve.auc():.4f}, EER {100 * curve.eer():.1f} %", alignment="left")
    axis.set(xscale="log", xlim=(least, 1), ylim=(0, 1.01), xlabel="false accept rate (FAR)", ylabel="validation rate (VAL)")
    axis.set_title(f"{curve.same:,} same and {curve.different:,} different pairs")
    return figure


def plot_gold(points: Mapping[str, tuple[Floats, Floats]]) -> Figure:
    """Plot, for each task, the cosine over the gold score, and its mean at each whole score."""
    columns = min(4, len(points))
    rows = -(-len(points) // columns)
    figure, axes = make_axes(3.2 * columns, 3 * rows, rows, columns, len(points))
    for axis, (task, (gold, cosine)) in zip(axes, points.items(), strict=True):
        axis.plot(gold, cosine, ".", color=GRAY, ms=2, alpha=0.35)
        rounded = np.round(gold)
        steps = np.unique(rounded)
        axis.plot(steps, [cosine[rounded == step].mean() for step in steps], "-o", color=ACCENT, ms=4)
        axis.set(title=figure_text(f"{task}, {len(gold):,} pairs"), xlabel="gold score", ylabel="cosine", ylim=(-0.3, 1.05))
    return figure


def plot_distances(distance: Floats, same: Bools, threshold: float) -> Figure:
    """Plot histograms of the distances of same and of different pairs; the threshold is the mean over folds."""
    figure, (axis,) = make_axes(5.6, 3.6)
    low, high = float(distance.min()), float(distance.max())
    bins = np.linspace(low, high if high > low else low + 1, 61).tolist()
    for chosen, color, label in ((~same, GRAY, "different people"), (same, ACCENT, "same person")):
        axis.hist(distance[chosen], bins=bins, histtype="stepfilled", fc=(color, 0.25), ec=color, lw=1.5, label=label)
    axis.axvline(threshold, color=DARK, lw=1)
    axis.set_ylim(0, 1.12 * axis.get_ylim()[1])
    place: Any = {"xytext": (5, 0), "xycoords": ("data", "axes fraction"), "textcoords": "offset points", "va": "top"}
    axis.annotate(f"threshold {threshold:.3f}", (threshold, 0.97), color=DARK, **place)
    axis.set(xlabel="squared distance on the unit sphere", ylabel="pairs")
    axis.legend(frameon=False, loc="upper left")
    return figure


def plot_errors(pairs: FacePairs, images: Sequence[bytes], distance: Floats, excess: Floats, columns: int = 5) -> Figure:
    """Show the worst false accepts and false rejects; ``excess (P,)`` is how far a distance misses its threshold, or 0."""
    figure = Figure(figsize=(2.3 * columns, 4.0), layout="constrained")
    parts: Any = figure.subfigures(2, 1)
    for part, kind, title in zip(parts, (False, True), ("Taken for one person", "Taken for two people"), strict=True):
        wrong = np.flatnonzero((pairs.same == kind) & (excess > 0))
        worst = wrong[np.argsort(-excess[wrong], kind="stable")][:columns]
        part.suptitle(f"{title}: {len(wrong):,} of {int((pairs.same == kind).sum()):,}", x=0.01, ha="left", weight="bold")
        axes = part.subplots(1, columns)
        for axis in axes:
            axis.set_axis_off()
        for axis, row in zip(axes, worst, strict=False):
            both = int(pairs.first[row]), int(pairs.second[row])
            gap = np.full((FACE_SIZE, 4, 3), 255, dtype=np.uint8)
            one, other = (np.asarray(make_thumbnail(images[index], FACE_SIZE)) for index in both)
            axis.imshow(np.concatenate([one, gap, other], axis=1))
            names = [pairs.faces[index][0].replace("_", " ") for index in (both[:1] if kind else both)]
            names = [name if len(name) <= 22 else f"{name[:21]}…" for name in names]
            axis.set_title(figure_text("\n".join([*names, f"{distance[row]:.2f}"])), fontsize=8, color=DARK)
    return figure


def make_axes(
    width: float, height: float, rows: int = 1, columns: int = 1, count: int | None = None
) -> tuple[Figure, list[Any]]:
    """A figure and its axes, row by row, the first ``count`` if given, made without pyplot: no window, and no global state."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(rows * columns if count is None else count)]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def figure_text(text: str) -> str:
    r"""Text for a figure: matplotlib reads what stands between dollars as mathematics.

    >>> figure_text("a $x_{$")
    'a \\$x_{\\$'
    """
    return printable(text).replace("$", r"\$")
