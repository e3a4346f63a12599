"""Figures of evaluators, and of pairs before and after training."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger

from tercet.images import make_thumbnail
from tercet.messages import describe_logger, log_errors, warn_once
from tercet.training.contrastive import Contrastive

if TYPE_CHECKING:
    from matplotlib.figure import Figure
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from tercet.types import Source


class EvaluatorFigures(pl.Callback):
    """The figures of each evaluator that draws: after the test as ``<name>.png``, with every validation ``val_<name>.png``.

    What both encode is remembered, so that a figure costs its drawing alone. All processes encode, the first one writes.
    """

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Contrastive) -> None:  # type: ignore[override]
        """The loggers keep those of every validation, the folder the last."""
        if not trainer.sanity_checking:
            _publish_all(trainer, pl_module, trainer.val_dataloaders, "val_")

    def on_test_end(self, trainer: pl.Trainer, pl_module: Contrastive) -> None:  # type: ignore[override]
        """Not those of the weights before training: they would be written over."""
        if pl_module.stage == "test":
            _publish_all(trainer, pl_module, trainer.test_dataloaders, "")


def _publish_all(trainer: pl.Trainer, pl_module: Contrastive, loader: Any, prefix: str) -> None:
    for call in loader.dataset:
        draw = getattr(call.__self__, "figures", None)
        for name, figure in (draw(pl_module.cached_encoder) if draw else {}).items():
            publish_figure(trainer, prefix + name, figure)


def publish_table(trainer: pl.Trainer, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """``<name>.csv`` in the run's folder, and the same in W&B and, as text, in TensorBoard; with images in W&B alone."""
    images = any(isinstance(cell, bytes) for row in rows for cell in row)
    path = Path(trainer.default_root_dir) / f"{name}.csv"
    try:
        if not images:
            with path.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([columns, *rows])
    except OSError as error:
        _missed(path, error)
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            data = [[_shown(cell) for cell in row] for row in rows]
            logger.log_table(key=f"tables/{name}", columns=list(columns), data=data, step=trainer.global_step)
        elif isinstance(logger, TensorBoardLogger) and not images:
            table = [columns, ["---"] * len(columns), *rows]
            lines = [" | ".join(str(cell).replace("|", " ") for cell in row) for row in table]
            with log_errors(describe_logger(logger)):
                logger.experiment.add_text(f"tables/{name}", "\n".join(lines), trainer.global_step)


def _shown(cell: Any) -> Any:
    import wandb

    return wandb.Image(make_thumbnail(cell)) if isinstance(cell, bytes) else cell


def publish_figure(trainer: pl.Trainer, name: str, figure: "Figure") -> None:
    """``<name>.png`` in the run's folder, and the same in W&B and TensorBoard."""
    if not trainer.is_global_zero:
        return
    path = Path(trainer.default_root_dir) / f"{name}.png"
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        _missed(path, error)
        return
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(key=f"figures/{name}", images=[str(path)], step=trainer.global_step)
        elif isinstance(logger, TensorBoardLogger):
            with log_errors(describe_logger(logger)):
                logger.experiment.add_figure(f"figures/{name}", figure, trainer.global_step, close=False)


def _missed(path: Path, error: OSError) -> None:
    path.unlink(missing_ok=True)  # half of it
    warn_once(f"{path} could not be written ({error}); training goes on without it.")


PAIRED, OTHER = "#1b7f79", "#c9c9c9"


@dataclass(frozen=True)
class PairScores:
    """Pairs as a model sees them: ``scores (N, N)``, the cosine of query i and document j."""

    scores: Tensor

    @property
    def ranks(self) -> Tensor:
        """``(N,)``: how many documents are nearer to the query than its own, 0 is best."""
        return (self.scores > self.scores.diagonal()[:, None]).sum(1)

    def recall(self, k: int) -> float:
        """The share of queries with their document among the first ``k``."""
        return float((self.ranks < k).float().mean())


class BeforeAfter(pl.Callback):
    """Looks at up to ``pairs`` held-out pairs before and after training; ``examples`` of them go into ``neighbours.md``.

    A source of one column has no pairs: then only its evaluators speak, and nothing is drawn.
    """

    def __init__(self, source: Source | None, pairs: int, examples: int) -> None:
        self.source = source
        self.pairs = pairs
        self.examples = examples
        self.looks: dict[str, PairScores] = {}
        self.texts: tuple[list[str], list[str]] | None = None

    def on_test_end(self, trainer: pl.Trainer, pl_module: Contrastive) -> None:  # type: ignore[override]
        """Look; draw once both stages are seen."""
        if self.source is None or len(self.source.columns) < 2 or trainer.default_root_dir is None:
            return
        queries, documents = self._read()
        encode = pl_module.cached_encoder
        x, y = F.normalize(encode(queries), dim=-1), F.normalize(encode(documents), dim=-1)
        self.looks[str(pl_module.stage)] = PairScores(x @ y.T)
        if len(self.looks) == 2 and trainer.is_global_zero:
            publish_figure(trainer, "before_after", draw_before_after(*self.looks.values()))
            (Path(trainer.default_root_dir) / "neighbours.md").write_text(self.neighbours(), encoding="utf-8")

    def _read(self) -> tuple[list[str], list[str]]:
        if self.texts is None:
            assert self.source is not None
            rows = self.source.rows()
            if len(rows) > self.pairs:
                rows = rows.shuffle(seed=0).select(range(self.pairs))
            first, second = (list(rows[c]) for c in list(self.source.columns)[:2])
            # A document that several queries share would make its other queries look like errors.
            keep = [i for i, text in enumerate(second) if second.index(text) == i]
            self.texts = [first[i] for i in keep], [second[i] for i in keep]
        return self.texts

    def neighbours(self) -> str:
        """Markdown: queries whose rank changed, with the nearest document before and after."""
        queries, documents = self._read()
        before, after = self.looks.values()
        step = max(1, len(queries) // self.examples)
        parts = ["# Nearest neighbours before and after\n"]
        for i in range(0, len(queries), step)[: self.examples]:
            parts.append(f"\n> {queries[i]}\n\n| | rank | nearest |\n|---|---|---|")
            for name, look in (("before", before), ("after", after)):
                nearest = int(look.scores[i].argmax())
                mark = " ✓" if nearest == i else ""
                parts.append(f"| {name} | {int(look.ranks[i]) + 1} | {documents[nearest]}{mark} |")
            parts.append(f"| sought | | {documents[i]} |")
        return "\n".join(parts) + "\n"


def draw_before_after(before: PairScores, after: PairScores) -> Figure:
    """Three panels: recall at every k, and how the cosines of pairs stand apart from all others, before and after."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    axes = figure.subplots(1, 3)
    size = len(before.scores)
    ks = sorted({round(10 ** (x / 20)) for x in range(int(20 * math.log10(size)) + 1)})
    for look, name, color in ((before, "before", "#888888"), (after, "after", PAIRED)):
        axes[0].plot(ks, [100 * look.recall(k) for k in ks], label=name, color=color, lw=2.5)
        axes[0].annotate(
            f"{100 * look.recall(1):.0f}", (1, 100 * look.recall(1)), (6, -4), textcoords="offset points", color=color
        )
    axes[0].set(
        xscale="log",
        xlabel=f"k of {size} documents",
        ylabel="found among the k nearest (%)",
        ylim=(0, 102),
        title="Recall",
    )
    axes[0].legend(frameon=False, loc="lower right")
    bins = torch.linspace(-0.4, 1, 57).tolist()
    for axis, look, name in ((axes[1], before, "before"), (axes[2], after, "after")):
        own = torch.eye(size, dtype=torch.bool)
        axis.hist(look.scores[~own].tolist(), bins=bins, density=True, color=OTHER, label="other pairs")
        axis.hist(look.scores[own].tolist(), bins=bins, density=True, color=PAIRED, alpha=0.75, label="true pairs")
        axis.set(
            xlabel="cosine",
            yticks=[],
            title=f"{name.capitalize()}: recall@1 {100 * look.recall(1):.0f} %",
            xlim=(-0.4, 1),
        )
    axes[1].legend(frameon=False)
    top = max(axes[1].get_ylim()[1], axes[2].get_ylim()[1])
    for axis in axes[1:]:
        axis.set_ylim(0, top)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure
