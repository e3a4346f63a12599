"""Figures of evaluators, and of pairs before and after training."""

import csv
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from tercet.evaluation.figures import ACCENT, GRAY, make_axes
from tercet.evaluation.inputs import embed_columns
from tercet.messages import csv_cell, log_errors, markdown_text
from tercet.paths import atomic_write
from tercet.training.callbacks.evaluation import Evaluation
from tercet.training.loggers import FIGURE, TABLE, has_images, log_to_all
from tercet.types import Source

OTHER_COLOR = "#c9c9c9"
_written: dict[Path, None] = {}  # the figures and tables of this process


def shown_files(folder: Path) -> list[Path]:
    """The figures and tables that this process has written into a folder, and not what else is there."""
    return [path for path in _written if path.parent == folder and path.is_file()]


class EvaluatorFigures(pl.Callback):
    """Draw the figures of the ``Evaluation`` callback's evaluators: ``<name>.png``, and ``val_<name>.png`` of validations.

    They use the embeddings that the evaluation has computed. All processes encode, the first one writes.
    """

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw; the loggers keep the figures of every validation, the run's folder those of the last."""
        if not trainer.sanity_checking:
            self._publish(trainer, pl_module, "validation", "val_")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw, except before training: the figures after it have the same names."""
        if pl_module.stage == "test":
            self._publish(trainer, pl_module, "test", "")

    def _publish(self, trainer: Any, module: Any, kind: str, prefix: str) -> None:
        for evaluation in (found for found in trainer.callbacks if isinstance(found, Evaluation)):
            draw = getattr(getattr(evaluation, kind), "figures", None)
            for name, figure in (draw(module.cached_encoder) if draw else {}).items():
                publish_figure(trainer, prefix + name, figure)


def publish_figure(trainer: pl.Trainer, name: str, figure: Figure) -> None:
    """Write ``<name>.png`` into the run's folder, from the first process, and log it."""
    path = Path(trainer.default_root_dir) / f"{name}.png"
    if trainer.is_global_zero:
        with _whole_file(path) as partial:
            figure.savefig(partial, dpi=150)
        if path.is_file():
            log_to_all(trainer, FIGURE, name, figure, str(path))


def publish_table(trainer: pl.Trainer, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Write ``<name>.csv`` into the run's folder, unless it has images (bytes), and log it."""
    path = Path(trainer.default_root_dir) / f"{name}.csv"
    if not has_images(rows):
        with _whole_file(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(map(csv_cell, row) for row in [columns, *rows])
    log_to_all(trainer, TABLE, name, columns, rows)


@contextmanager
def _whole_file(path: Path) -> Iterator[Path]:
    """Write a file whole; where it cannot be written, warn: the run goes on."""
    with log_errors(f"{path}"):
        with atomic_write(path) as partial:
            yield partial
        _written[path] = None


def draw_cosines(axis: Any, title: str, true: Tensor, other: Tensor, least: float) -> None:
    """Histograms of the cosines of true pairs and of all others, from ``least`` to 1."""
    bins = torch.linspace(least, 1, round(40 * (1 - least)) + 1).tolist()
    axis.hist(other.tolist(), bins=bins, density=True, color=OTHER_COLOR, label="other pairs")
    if len(true):
        axis.hist(true.tolist(), bins=bins, density=True, color=ACCENT, alpha=0.75, label="true pairs")
    axis.set(title=title, xlabel="cosine", yticks=[])


def recall_at(k: int, scores: Tensor) -> float:
    """The share of queries whose document is among the ``k`` nearest; ``scores (N, N)`` of query i and document j."""
    return float(((scores > scores.diagonal()[:, None]).sum(1) < k).float().mean())


class BeforeAfter(pl.Callback):
    """Compare up to ``pairs`` held-out pairs before and after training: ``before_after.png``, and ``neighbors.md``.

    ``neighbors.md`` shows ``examples`` of the queries with their nearest document. Nothing is drawn for a source of one column.
    """

    def __init__(self, source: Source | None = None, pairs: int = 2000, examples: int = 6) -> None:
        self.source, self.pairs, self.examples = source, pairs, examples
        self.scores: dict[str, Tensor] = {}  # cosines (N, N) of queries and documents, by stage

    def on_test_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Score the pairs; draw once both stages have been scored."""
        if self.source is None or len(self.source.columns) < 2:
            return
        queries, documents = self.texts
        x, y = (F.normalize(z, dim=-1) for z in embed_columns(pl_module.cached_encoder, queries, documents))
        self.scores[str(pl_module.stage)] = x @ y.T
        if len(self.scores) == 2 and trainer.is_global_zero:
            publish_figure(trainer, "before_after", draw_before_after(*self.scores.values()))
            with _whole_file(Path(trainer.default_root_dir) / "neighbors.md") as partial:
                partial.write_text(self.neighbors(), encoding="utf-8")

    @cached_property
    def texts(self) -> tuple[list[str], list[str]]:
        """Queries and their documents, distinct: where queries share one, the others would count as errors."""
        assert self.source is not None
        rows = self.source.rows()
        if len(rows) > self.pairs:
            rows = rows.shuffle(seed=0).select(range(self.pairs))
        first, second = (list(rows[c]) for c in list(self.source.columns)[:2])
        keep = [i for i, text in enumerate(second) if second.index(text) == i]
        return [first[i] for i in keep], [second[i] for i in keep]

    def neighbors(self) -> str:
        """Queries, evenly spaced, with the rank of their document and the nearest one before and after, as Markdown."""
        queries, documents = self.texts
        step = max(1, len(queries) // self.examples)
        parts = ["# Nearest neighbors before and after\n"]
        for i in range(0, len(queries), step)[: self.examples]:
            parts.append(f"\n> {markdown_text(queries[i])}\n\n| | rank | nearest |\n|---|---|---|")
            for name, scores in zip(("before", "after"), self.scores.values(), strict=True):
                nearest, rank = int(scores[i].argmax()), int((scores[i] > scores[i, i]).sum()) + 1
                parts.append(f"| {name} | {rank} | {markdown_text(documents[nearest])}{' ✓' if nearest == i else ''} |")
            parts.append(f"| correct | | {markdown_text(documents[i])} |")
        return "\n".join(parts) + "\n"


def draw_before_after(before: Tensor, after: Tensor) -> Figure:
    """Three panels: recall at every k, and the cosines of pairs and of all other combinations before and after."""
    figure, axes = make_axes(13, 4, columns=3)
    _draw_recall(axes[0], before, after)
    own = torch.eye(len(before), dtype=torch.bool)
    for axis, scores, name in ((axes[1], before, "Before"), (axes[2], after, "After")):
        draw_cosines(axis, f"{name}: recall@1 {100 * recall_at(1, scores):.0f} %", scores[own], scores[~own], -0.4)
        axis.set_xlim(-0.4, 1)
    axes[1].legend(frameon=False)
    for axis in axes[1:]:
        axis.set_ylim(0, max(axis.get_ylim()[1] for axis in axes[1:]))
    return figure


def _draw_recall(axis: Any, before: Tensor, after: Tensor) -> None:
    ks = sorted({round(10 ** (x / 20)) for x in range(int(20 * math.log10(len(before))) + 1)})
    for scores, name, color in ((before, "before", GRAY), (after, "after", ACCENT)):
        found = [100 * recall_at(k, scores) for k in ks]
        axis.plot(ks, found, label=name, color=color, lw=2.5)
        axis.annotate(f"{found[0]:.0f}", (1, found[0]), (6, -4), textcoords="offset points", color=color)
    axis.set(xscale="log", xlabel=f"k of {len(before)} documents", ylabel="found among the k nearest (%)", title="Recall")
    axis.set_ylim(0, 102)
    axis.legend(frameon=False, loc="lower right")
