"""The training step that every objective shares."""

from collections.abc import Callable
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from tercet.distributed.gather import gather_embeddings, reduce_loss, row_counts
from tercet.distributed.ring import BlockwiseLoss, ring_statistics
from tercet.errors import InputError
from tercet.models import CachedEncoder, Encoder
from tercet.models.checkpoint import KEY, encoder_spec
from tercet.models.engine.deterministic_dropout import with_dropout_seeds
from tercet.training import sharding
from tercet.training.masked_lm import MaskedLM
from tercet.training.memory import Memory
from tercet.types import Batch, Embeddings, Evaluator, LossOutput, TokenBatch, concat_inputs

ENOUGH = 1024
RING = 1 << 30  # bytes of keys that are not gathered any more


class Contrastive(pl.LightningModule):
    """Encode the batch, gather the keys, sum the loss over own anchors, divide by the global count.

    An objective says what a batch means to it: ``views`` picks the columns, ``columns`` how many it needs, ``positives``
    what makes two rows of the batch alike (a ``label``, or the ``example`` that both are views of). ``optimizer`` takes
    the module, ``schedule`` the optimizer and the number of steps.
    """

    columns: ClassVar[tuple[int, int]]  # the fewest and the most columns
    positives: ClassVar[str] = "example"
    dropout_views: ClassVar[bool] = False

    def __init__(
        self,
        encoder: Encoder,
        loss: nn.Module,
        optimizer: Callable[[nn.Module], Optimizer],
        scheduler: Callable[[Optimizer, int], LRScheduler],
        mlm: MaskedLM,
        memory: Memory,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.loss = loss
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.mlm_weight = mlm.weight
        self.mlm = mlm.build(encoder)
        self.memory = memory.build()
        if self.memory is not None and getattr(loss, "exchange", None) == "ring":
            raise InputError("objective.memory holds all keys, loss.key_exchange=ring shows one process's at a time: choose.")
        self.seed = 0
        self.num_unreadable = 0  # rows that could not be read
        self.stage = "test"
        self.cached_encoder: CachedEncoder

    def views(self, batch: Batch) -> Batch:
        """The views that this objective contrasts."""
        return batch

    def training_views(self, batch: Batch) -> Batch:
        """The views, and what dropout draws from where that is a function of the row."""
        batch = self.views(batch)
        return with_dropout_seeds(batch, self.seed, self.global_step) if self.encoder.deterministic_dropout else batch

    def configure_model(self) -> None:
        """Share out the encoder where the strategy is FSDP2."""
        if isinstance(self.trainer.strategy, sharding.FSDP2Strategy):
            sharding.shard(self.encoder, self.trainer.strategy.device_mesh["data_parallel"])

    def on_fit_start(self) -> None:
        """One seed in all processes: that of ``seed_everything``."""
        self.seed = int(self.trainer.strategy.broadcast(torch.initial_seed() % (1 << 62)))

    def embed(self, batch: Batch) -> Embeddings:
        """All views in one forward pass: ``z (V, N, D)``."""
        z = sharding.equalized_forward(self.encoder, concat_inputs(batch.views)).unflatten(0, (len(batch.views), len(batch)))
        return Embeddings(z, batch.example_id, batch.label, batch.position, batch.content_hash)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The value whose gradient, averaged over the processes, is the one of the whole global batch."""
        batch = self.training_views(batch)
        anchors = self.embed(batch)
        keys, terms = self._contrast(anchors)
        value, logged = reduce_loss(LossOutput(terms.loss_sum, terms.normalizer, {**terms.stats, **_alignment(anchors)}))
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

    def on_after_backward(self) -> None:
        """The gradient is in its shares, if there are shares."""
        sharding.reshard(self.encoder)

    def _contrast(self, anchors: Embeddings) -> tuple[Embeddings, LossOutput]:
        """The keys that this process has seen at once, and its anchors' loss against all."""
        counts = row_counts(len(anchors), anchors.z.device)
        if isinstance(self.loss, BlockwiseLoss) and self._rings(self.loss.key_exchange, counts, anchors.z):
            parts = ring_statistics(
                self.loss.block_statistics, self.loss.prepare(anchors), counts, list(self.loss.parameters())
            )
            return anchors, self.loss.combine(parts)
        keys = gather_embeddings(anchors, counts)
        return keys, self.loss(anchors, self._remembered(keys))

    def _rings(self, exchange: str, counts: list[int], z: Tensor) -> bool:
        many = exchange == "auto" and self.memory is None and sum(counts) * len(z) * z.shape[2] * 4 > RING
        return len(counts) > 1 and (exchange == "ring" or many)

    def _remembered(self, keys: Embeddings) -> Embeddings:
        if self.memory is None:
            return keys
        self.memory.to_device(keys.z.device)
        more = self.memory.extend(keys)
        if torch.isfinite(keys.z).all():  # what is no number would stay
            self.memory.push(keys)
        return more

    def validation_step(self, evaluator: Evaluator, batch_idx: int) -> None:
        """An evaluator is one batch of a validation epoch."""
        self.log_dict({f"val/{name}": x for name, x in self.measure(evaluator).items()}, batch_size=1, rank_zero_only=False)

    def test_step(self, evaluator: Evaluator, batch_idx: int) -> None:
        """The same under ``stage``: ``before`` training, ``test`` after it."""
        metrics = self.measure(evaluator)
        self.log_dict({f"{self.stage}/{name}": x for name, x in metrics.items()}, batch_size=1)

    def measure(self, evaluator: Evaluator) -> dict[str, float]:
        """Run an evaluator on the encoder: vectors in the training precision, scores in full."""
        with torch.autocast(self.device.type, enabled=False):
            return evaluator(self.cached_encoder)

    def on_validation_epoch_start(self) -> None:
        """New weights, new vectors."""
        encoder = sharding.unsharded(self.encoder)
        self.cached_encoder = CachedEncoder(encoder, self.trainer.precision_plugin.forward_context, progress="evaluating")

    def on_validation_epoch_end(self) -> None:
        """A monitor that nothing measures would let every checkpoint be the best."""
        monitor = getattr(self.trainer.checkpoint_callback, "monitor", None)
        seen = sorted(name for name in self.trainer.callback_metrics if name.startswith("val/"))
        if monitor and monitor not in seen:
            raise InputError(f"monitor={monitor} is not measured in validation. There are: {', '.join(seen)}.")

    def on_test_epoch_start(self) -> None:
        """New weights, new vectors; callbacks of the test may use them too."""
        self.on_validation_epoch_start()

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Evaluators stay where they are."""
        return batch.to(device) if isinstance(batch, Batch) else batch

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The schedule moves every step."""
        optimizer = self.optimizer(self)
        steps = self.trainer.estimated_stepping_batches
        if not 1 <= steps < float("inf"):  # a stream has no length, and an end by time is no number of steps
            raise InputError("The number of steps is not known, so the schedule cannot be laid out. Set trainer.max_steps.")
        schedule = self.scheduler(optimizer, int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": "train/lr"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint holds all that the encoder is built from: it can be moved and read alone."""
        checkpoint[KEY] = encoder_spec(self.encoder)


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

    Of its first rows where there are more than ``ENOUGH``: all pairs of those are a million.
    """
    x = F.normalize(z[:ENOUGH].detach().float(), dim=-1)
    if len(x) < 2:
        return x.new_zeros(())
    return (4 * (x @ x.T - 1)).fill_diagonal_(-torch.inf).exp().sum().div(len(x) * (len(x) - 1)).log()


@torch.no_grad()
def _spread(z: Tensor) -> dict[str, Tensor]:
    """Of the global batch on the unit sphere: the mean ||x - y||^2 over distinct pairs, and the length of the mean row.

    Where keys go in a ring it is of one's own rows.
    A collapsed encoder has spread 0 and length 1; 2 and 0 are those of an even sphere.
    """
    x = F.normalize(z.detach().float(), dim=-1)
    square = x.mean(0).square().sum()
    return {"spread": 2 * len(x) / max(1, len(x) - 1) * (1 - square), "mean_norm": square.sqrt()}
