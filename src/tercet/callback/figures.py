"""What evaluators draw, in the run's folder and in every logger."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import TensorBoardLogger

from tercet.notice import say_once
from tercet.objective.contrastive import Contrastive

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Figures(pl.Callback):
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
        for name, figure in (draw(pl_module.encoding) if draw else {}).items():
            publish(trainer, prefix + name, figure)


def publish_table(trainer: pl.Trainer, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """``<name>.csv`` in the run's folder, and the same in W&B and, as text, in TensorBoard."""
    path = Path(trainer.default_root_dir) / f"{name}.csv"
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([columns, *rows])
    except OSError as error:
        _missed(path, error)
    for logger in trainer.loggers:
        if hasattr(logger, "log_table"):
            logger.log_table(key=name, columns=list(columns), data=[list(row) for row in rows])
        elif isinstance(logger, TensorBoardLogger):
            table = [columns, ["---"] * len(columns), *rows]
            lines = [" | ".join(str(cell).replace("|", " ") for cell in row) for row in table]
            logger.experiment.add_text(name, "\n".join(lines), trainer.global_step)


def publish(trainer: pl.Trainer, name: str, figure: "Figure") -> None:
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
        if hasattr(logger, "log_image"):
            logger.log_image(key=name, images=[str(path)])
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_figure(name, figure, trainer.global_step, close=False)


def _missed(path: Path, error: OSError) -> None:
    path.unlink(missing_ok=True)  # half of it
    say_once(f"{path} could not be written ({error}); training goes on without it.")
