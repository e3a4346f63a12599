"""The training step that the contrastive objectives share."""

from collections.abc import Callable
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from tercet.distributed.gather import reduce_loss
from tercet.distributed.ring import contrast
from tercet.distributed.sharding import equalized_forward, reshard, shard
from tercet.errors import InputError
from tercet.losses import InfoNCE
from tercet.models import CachedEncoder, Encoder
from tercet.models.engine.deterministic_dropout import with_dropout_seeds
from tercet.models.loading import KEY, encoder_spec
from tercet.training.lightning_compat import EvaluationHooks, FSDP2Strategy
from tercet.training.masked_lm import MaskedLM
from tercet.training.memory import Memory
from tercet.training.optimizers import MakeOptimizer, MakeScheduler, adamw, make_scheduler, optimizer_with_schedule
from tercet.types import Batch, Embeddings, LossOutput, TokenBatch, concat_inputs

UNIFORMITY_ROWS = 1024


class Contrastive(EvaluationHooks, pl.LightningModule):
    """Embed the batch, gather the keys, sum the loss over this process's anchors, divide by the global normalizer.

    A subclass declares what it needs: ``columns`` is the fewest and the most columns of the data; ``positives`` is what makes
    two rows of a batch positives of each other (the same ``example``, ``label`` or neighboring ``position``);
    ``makes_views`` says whether it makes the two views of a text itself; ``needs`` is what a batch must hold. It may override
    ``views``, which selects or makes the views, and ``embed``.

    ``optimizer`` takes the module; ``scheduler`` takes the optimizer and the number of steps. The optimizer is AdamW at 3e-5
    with a linear schedule, the loss ``default_loss``, unless given.
    """

    columns: ClassVar[tuple[int, int]] = (1, 3)
    positives: ClassVar[str] = "example"
    makes_views: ClassVar[bool] = False
    default_loss: ClassVar[Callable[[], nn.Module]] = InfoNCE
    cached_encoder: CachedEncoder  # set by callbacks that evaluate

    def __init__(
        self, encoder: Encoder, loss: nn.Module | None = None, optimizer: MakeOptimizer = adamw,
        scheduler: MakeScheduler = make_scheduler, mlm: MaskedLM | None = None, memory: Memory | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.encoder = encoder
        self.loss = type(self).default_loss() if loss is None else loss
        self.optimizer = optimizer
        self.scheduler = scheduler
        mlm, memory = mlm or MaskedLM(), memory or Memory()
        self.mlm_weight = mlm.weight
        self.mlm = mlm.build(encoder)
        self.memory = memory.build()
        if self.memory is not None and getattr(self.loss, "key_exchange", None) == "ring":
            raise InputError(
                f"`memory.size`={memory.size} with `loss.key_exchange`=ring: a memory holds all keys, but in a ring each "
                "process has those of one process at a time. Use only one of the two."
            )
        self.seed = 0
        self.num_unreadable = 0  # rows that could not be read so far
        self.stage = "test"

    @classmethod
    def needs(cls, num_columns: int) -> frozenset[str]:
        """What a batch of ``num_columns`` columns must hold: a subset of {"same_label", "adjacent"}."""
        return frozenset()

    def views(self, batch: Batch) -> Batch:
        """The views that this objective contrasts."""
        return batch

    def training_views(self, batch: Batch) -> Batch:
        """The views, with the seeds of deterministic dropout where the encoder uses it."""
        batch = self.views(batch)
        return with_dropout_seeds(batch, self.seed, self.global_step) if self.encoder.deterministic_dropout else batch

    def embed(self, batch: Batch) -> Embeddings:
        """All views in one forward pass: ``z (V, N, D)``."""
        z = equalized_forward(self.encoder, concat_inputs(batch.views)).unflatten(0, (len(batch.views), len(batch)))
        return Embeddings(z, batch.example_id, batch.label, batch.position, batch.content_hash)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """A value whose gradient, averaged over the processes, is that of the loss of the global batch."""
        batch = self.training_views(batch)
        anchors = self.embed(batch)
        keys, output = contrast(self.loss, anchors, None if self.memory is None else self.memory.extend_and_push)
        value, logged = reduce_loss(LossOutput(output.loss_sum, output.normalizer, {**output.stats, **_alignment(anchors)}))
        logged |= {"uniformity": _uniformity(anchors.z[0]), **_spread(keys.z[0])}
        if self.mlm is not None:
            masked, entropy = reduce_loss(self.mlm(TokenBatch.concat([v for v in batch.views if isinstance(v, TokenBatch)])))
            value = value + self.mlm_weight * masked
            logged["mlm_loss"] = entropy["loss"]
        self.num_unreadable += batch.num_unreadable
        if self.num_unreadable:
            logged["unreadable"] = value.new_tensor(float(self.num_unreadable))
        self.log_dict({f"train/{name}": x for name, x in logged.items()}, batch_size=len(batch))
        return value

    def configure_model(self) -> None:
        """Shard the encoder where the strategy is FSDP2."""
        if isinstance(self.trainer.strategy, FSDP2Strategy):
            shard(self.encoder, self.trainer.strategy.device_mesh["data_parallel"])

    def on_fit_start(self) -> None:
        """Use one seed in all processes: that of ``seed_everything``."""
        self.seed = shared_seed(self.trainer)

    def on_after_backward(self) -> None:
        """Free gathered weights; gradients are sharded by now."""
        reshard(self.encoder)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer and its schedule, which advances every step."""
        return optimizer_with_schedule(self, self.optimizer, self.scheduler)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what the encoder is built from: a checkpoint can be moved and opened alone."""
        checkpoint[KEY] = encoder_spec(self.encoder)


def shared_seed(trainer: pl.Trainer) -> int:
    """The first process's seed, the same number in all processes."""
    return int(trainer.strategy.broadcast(torch.initial_seed() % (1 << 62)))


@torch.no_grad()
def _alignment(anchors: Embeddings) -> dict[str, Tensor]:
    """The sum over rows of ||x - y||^2 of the first two views on the unit sphere (Wang and Isola 2020, eq. 1)."""
    if len(anchors.z) < 2:
        return {}
    x, y = F.normalize(anchors.z[:2].detach().float(), dim=-1)
    total = (x - y).square().sum()
    return {"alignment": torch.stack([total, total.new_tensor(len(x))])}


@torch.no_grad()
def _uniformity(z: Tensor) -> Tensor:
    """Log mean over distinct pairs of exp(-2 ||x - y||^2) in this process's batch (Wang and Isola 2020, eq. 2).

    Only the first ``UNIFORMITY_ROWS`` rows are used: they have a million pairs.
    """
    x = F.normalize(z[:UNIFORMITY_ROWS].detach().float(), dim=-1)
    if len(x) < 2:
        return x.new_zeros(())
    return (4 * (x @ x.T - 1)).fill_diagonal_(-torch.inf).exp().sum().div(len(x) * (len(x) - 1)).log()


@torch.no_grad()
def _spread(z: Tensor) -> dict[str, Tensor]:
    """The mean ||x - y||^2 over distinct pairs on the unit sphere, and the length of the mean row.

    Of the global batch, or of this process's rows where keys go around in a ring. A collapsed encoder has spread 0 and length
    1; directions that are evenly distributed have 2 and 0.
    """
    x = F.normalize(z.detach().float(), dim=-1)
    square = x.mean(0).square().sum()
    return {"spread": 2 * len(x) / max(1, len(x) - 1) * (1 - square), "mean_norm": square.sqrt()}
