"""Put labels that the model confuses into one batch."""

from collections import defaultdict
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from tercet.data import PKBatchSampler
from tercet.distributed.gather import gather_rows, rank, world_size
from tercet.distributed.sharding import gather_weights
from tercet.errors import require
from tercet.evaluation.search import FalseNegativeFilter, hard_negatives
from tercet.models.encoder import evaluation_mode
from tercet.types import BatchIndices

CHUNK = 256  # rows of one forward pass


class HardLabels(pl.Callback):
    """Every ``every`` epochs, embed up to ``rows`` training rows and find for each label the ``labels`` nearest other labels.

    The sampler, a ``PKBatchSampler``, then draws a label together with these. Pairs of rows that are more similar than
    ``max_similarity``, or than (1 - ``relative_margin``) times the similarity to the row's nearest positive, are considered
    mislabeled and not counted.
    """

    sampler: PKBatchSampler

    def __init__(
        self, every: int = 1, rows: int = 20_000, labels: int = 5, max_similarity: float = 0.95,
        relative_margin: float | None = 0.05,
    ) -> None:  # fmt: skip
        valid = every >= 1 and rows >= 2 and labels >= 1
        require(valid, f"`every`={every}, `rows`={rows}, `labels`={labels}: at least 1, 2 and 1 are needed.")
        self.every, self.rows, self.labels = every, rows, labels
        self.filter = FalseNegativeFilter(max_similarity, relative_margin)
        self.neighbors: dict[int, list[int]] = {}
        self.epoch: int | None = None  # that the neighbors are of

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the sampler the neighbors of a checkpoint, or find those of the epoch that begins where it ended another."""
        sampler = trainer.datamodule.sampler  # type: ignore[attr-defined]
        got = f"it needs a PKBatchSampler, but the sampler is {type(sampler).__name__}."
        require(hasattr(sampler, "neighbors"), f"HardLabels chooses the labels of a batch: {got}")
        sampler.neighbors, self.sampler = self.neighbors, sampler
        if self.epoch not in (None, trainer.current_epoch):  # Lightning calls no on_train_epoch_start then
            self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find neighbors before the epoch's batches are drawn, except in the first epoch."""
        self.epoch = trainer.current_epoch
        if trainer.current_epoch == 0 or trainer.current_epoch % self.every:
            return
        z, label = embed_rows(trainer, pl_module, self._sample_rows(self.sampler, trainer.current_epoch))
        limit = self.filter.limit(nearest_positive(z, label))
        scores, at = hard_negatives(z, z, lambda rows, keys: label[keys] != label[rows, None], limit, self.labels)
        self.neighbors = self.sampler.neighbors = confusable_labels(label, scores, at, self.labels)
        if bool((at >= 0).any()):
            pl_module.log("train/confusable_similarity", scores[at >= 0].mean(), batch_size=1)

    def _sample_rows(self, sampler: PKBatchSampler, epoch: int) -> Tensor:
        """As many rows of each label that occurs twice or more, the same in every process."""
        each = max(2, self.rows // len(sampler.rows_by_label))
        rng = np.random.default_rng([sampler.seed, epoch])
        rows = [rng.permutation(members)[:each] for members in sampler.rows_by_label.values()]
        return torch.from_numpy(np.concatenate(rows)[: self.rows])

    def state_dict(self) -> dict[str, Any]:
        """The neighbors and their epoch."""
        return {"neighbors": self.neighbors, "epoch": self.epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore them."""
        self.neighbors, self.epoch = state_dict["neighbors"], state_dict.get("epoch")


@torch.no_grad()
def embed_rows(trainer: pl.Trainer, module: Any, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors ``(N, D)`` and labels ``(N,)`` of training rows, transformed as in training; the same in every process."""
    encoder, data = gather_weights(module.encoder), trainer.datamodule  # type: ignore[attr-defined]
    parts = [(torch.zeros(0, encoder.dim), torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long))]
    with evaluation_mode(encoder):
        for own in rows.split(CHUNK)[rank() :: world_size()]:
            batch = data.dataset[BatchIndices(own.tolist(), trainer.current_epoch)]
            if len(batch) == 0:  # no image could be read
                continue
            with trainer.precision_plugin.forward_context():
                z = encoder.run(batch.views[0].to(module.device), encoder.execution.unchunked()).float()
            parts.append((F.normalize(z, dim=-1), batch.label, batch.example_id))
    z, label, ids = (gather_rows(torch.cat(part).to(module.device)).cpu() for part in zip(*parts, strict=True))
    order = ids.argsort()
    return z[order], label[order]


def nearest_positive(z: Tensor, label: Tensor) -> Tensor:
    """The cosine of each unit row ``(N, D)`` to the nearest other of its label ``(N,)``; NaN where there is none."""
    best = z.new_full((len(z),), torch.nan)
    for rows in label.argsort(stable=True).split(label.unique(return_counts=True)[1].tolist()):
        if len(rows) > 1:
            best[rows] = (z[rows] @ z[rows].T).fill_diagonal_(-torch.inf).amax(1)
    return best


def confusable_labels(label: Tensor, scores: Tensor, at: Tensor, most: int) -> dict[int, list[int]]:
    """The ``most`` nearest labels of each label, by the summed similarity of their rows.

    ``label (N,)``; ``scores (N, k)`` and ``at (N, k)``: the cosines and rows of each row's neighbors, -1 where there is none.
    """
    votes: dict[int, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    row, column = (at >= 0).nonzero(as_tuple=True)
    others = label[at[row, column]].tolist()
    for own, other, score in zip(label[row].tolist(), others, scores[row, column].tolist(), strict=True):
        votes[own][other] += 1 + score  # never below 0
    return {own: sorted(found, key=lambda name: (-found[name], name))[:most] for own, found in votes.items()}
