"""Labels that the model confuses, in one batch."""

from collections import defaultdict
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from tercet.data import PKBatchSampler
from tercet.distributed.gather import gather_rows, rank, world_size
from tercet.errors import InputError
from tercet.evaluation.search import FalseNegativeFilter, hard_negatives
from tercet.training.contrastive import Contrastive
from tercet.types import BatchIndices

PART = 256  # rows in one pass


class HardLabels(pl.Callback):
    """Every ``every`` epochs the current model embeds the training rows, ``rows`` at most, and says which labels lie close.

    The sampler then draws a label together with up to ``labels`` of its confusable ones. Mining itself stays online and
    exact: only the composition of batches depends on these neighbours, nothing stale enters the loss. Pairs of rows more
    similar than ``max_similarity``, or than (1 - ``relative_margin``) times the row's own nearest positive, are taken for
    mislabelled and not counted. Needs sampler=pk.
    """

    def __init__(self, every: int, rows: int, labels: int, max_similarity: float, relative_margin: float | None) -> None:
        if every < 1 or rows < 2 or labels < 1:
            raise InputError(f"callback.hard_labels: every={every}, rows={rows}, labels={labels}; 1, 2 and 1 are the least.")
        self.every, self.rows, self.labels = every, rows, labels
        self.guard = FalseNegativeFilter(max_similarity, relative_margin)
        self.neighbors: dict[int, list[int]] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: Contrastive) -> None:  # type: ignore[override]
        """A run that goes on has neighbours from its checkpoint."""
        self._sampler(trainer).neighbors = self.neighbors

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Contrastive) -> None:  # type: ignore[override]
        """Before the epoch's batches are drawn; the first epoch's model knows nothing yet."""
        if trainer.current_epoch == 0 or trainer.current_epoch % self.every:
            return
        sampler = self._sampler(trainer)
        z, label = embed_rows(trainer, pl_module, self._pool(sampler, trainer.current_epoch))
        limit = self.guard.limit(nearest_positive(z, label))
        scores, at = hard_negatives(z, z, lambda rows, keys: label[keys] != label[rows, None], limit, self.labels)
        self.neighbors = sampler.neighbors = confusable_labels(label, scores, at, self.labels)
        if bool((at >= 0).any()):
            pl_module.log("train/confusable_similarity", scores[at >= 0].mean(), batch_size=1)

    def _sampler(self, trainer: pl.Trainer) -> PKBatchSampler:
        sampler = trainer.datamodule.sampler  # type: ignore[attr-defined]
        if not isinstance(sampler, PKBatchSampler):
            raise InputError("callback.hard_labels chooses the labels of a batch: it needs sampler=pk.")
        return sampler

    def _pool(self, sampler: PKBatchSampler, epoch: int) -> Tensor:
        """As many rows of each label that occurs twice or more, the same in every process."""
        each = max(2, self.rows // len(sampler.rows_by_label))
        rng = np.random.default_rng([sampler.seed, epoch])
        rows = [rng.permutation(members)[:each] for members in sampler.rows_by_label.values()]
        return torch.from_numpy(np.concatenate(rows)[: self.rows])

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints."""
        return {"neighbors": self.neighbors}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse."""
        self.neighbors = state_dict["neighbors"]


@torch.no_grad()
def embed_rows(trainer: pl.Trainer, pl_module: Contrastive, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Training rows, read as training reads them, to unit vectors ``(N, D)`` and labels ``(N,)``: the same in every process."""
    encoder, data = pl_module.encoder, trainer.datamodule  # type: ignore[attr-defined]
    parts = [(torch.zeros(0, encoder.dim), torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long))]
    training = encoder.training
    encoder.eval()
    for own in rows.split(PART)[rank() :: world_size()]:
        batch = data.dataset[BatchIndices(own.tolist(), trainer.current_epoch)]
        if len(batch) == 0:  # none of its images could be read
            continue
        with trainer.precision_plugin.forward_context():
            z = encoder.run(batch.views[0].to(pl_module.device), encoder.execution.unchunked()).float()
        parts.append((F.normalize(z, dim=-1), batch.label, batch.example_id))
    encoder.train(training)
    z, label, uid = (gather_rows(torch.cat(part).to(pl_module.device)).cpu() for part in zip(*parts, strict=True))
    order = uid.argsort()
    return z[order], label[order]


def nearest_positive(z: Tensor, label: Tensor) -> Tensor:
    """The cosine of each unit row ``(N, D)`` to the nearest other of its label ``(N,)``; NaN where there is none."""
    best = z.new_full((len(z),), torch.nan)
    order = label.argsort(stable=True)
    for rows in order.split(label.unique(return_counts=True)[1].tolist()):
        if len(rows) > 1:
            best[rows] = (z[rows] @ z[rows].T).fill_diagonal_(-torch.inf).amax(1)
    return best


def confusable_labels(label: Tensor, scores: Tensor, at: Tensor, most: int) -> dict[int, list[int]]:
    """Each label's neighbours by summed similarity of their rows: ``(N,), (N, k), (N, k)``."""
    votes: dict[int, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    row, column = (at >= 0).nonzero(as_tuple=True)
    others = label[at[row, column]].tolist()
    for own, other, score in zip(label[row].tolist(), others, scores[row, column].tolist(), strict=True):
        votes[own][other] += 1 + score  # never below 0
    return {own: sorted(found, key=lambda name: (-found[name], name))[:most] for own, found in votes.items()}
