"""What the space looks like: a map, how true and other pairs stand apart, the spectrum, and its path over training."""

from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.loggers import TensorBoardLogger

from tercet.callback.figures import publish, publish_table
from tercet.callback.sample import Sample, draw, sheet
from tercet.contract import Item, Source
from tercet.distributed import world_size
from tercet.image import BadImage, content
from tercet.model import Encoder, ImageEncoder
from tercet.objective.contrastive import Contrastive


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
        z = torch.stack([F.normalize(pl_module.encoding(column), dim=-1) for column in self.items])
        sample = Sample(z.float(), self.label)
        self.path.append((when, *sample.spread()))
        if when != "before" and trainer.is_global_zero:
            publish(trainer, "embeddings", draw(sample, self.path, self.umap))
            self._show(trainer, sample)
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger) and when == "test":
                    said = [
                        str(item)[:100] if isinstance(item, str) else str(i) for i, item in enumerate(self.items[0])
                    ]
                    logger.experiment.add_embedding(z[0], metadata=said, global_step=trainer.global_step)

    def _show(self, trainer: pl.Trainer, sample: Sample) -> None:
        assert self.items is not None
        triplets = sample.triplets(self.pairs)
        one, other = self.items[0], self.items[-1]
        if isinstance(one[0], bytes):
            publish(trainer, "triplets", sheet(triplets, one))
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
            items = [[cell if isinstance(cell, str) else content(cell) for cell in column] for column in cells]
            kept = [i for i, row in enumerate(zip(*items, strict=True)) if all(usable(encoder, item) for item in row)]
            self.items = [[column[i] for i in kept] for column in items]
            if "label" in table.column_names:
                self.label = torch.as_tensor(table["label"])[kept]
            else:
                self.label = torch.full((len(kept),), -1)
        return len(self.items[0]) > 2


def usable(encoder: Encoder, item: Item) -> bool:
    """Whether the encoder can read it."""
    if not isinstance(encoder, ImageEncoder) or isinstance(item, str):
        return True
    try:
        encoder.pixels.open(item)
    except BadImage:
        return False
    return True
