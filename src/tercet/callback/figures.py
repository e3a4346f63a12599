"""What evaluators draw, in the run's folder and in every logger."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger

from tercet.image import thumbnail
from tercet.notice import enduring, say_once, told
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
            with enduring(told(logger)):
                logger.experiment.add_text(f"tables/{name}", "\n".join(lines), trainer.global_step)


def _shown(cell: Any) -> Any:
    import wandb

    return wandb.Image(thumbnail(cell)) if isinstance(cell, bytes) else cell


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
        if isinstance(logger, WandbLogger):
            logger.log_image(key=f"figures/{name}", images=[str(path)], step=trainer.global_step)
        elif isinstance(logger, TensorBoardLogger):
            with enduring(told(logger)):
                logger.experiment.add_figure(f"figures/{name}", figure, trainer.global_step, close=False)


def _missed(path: Path, error: OSError) -> None:
    path.unlink(missing_ok=True)  # half of it
    say_once(f"{path} could not be written ({error}); training goes on without it.")
