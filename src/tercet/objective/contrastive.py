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

from tercet.contract import Batch, Embedded, Evaluator, Ragged, Terms
from tercet.distributed import gather, mean
from tercet.error import InputError
from tercet.model import Encoding, TextEncoder
from tercet.model.checkpoint import KEY, describe
from tercet.objective.mlm import MaskedLM


class Contrastive(pl.LightningModule):
    """Encode the batch, gather the keys, sum the loss over own anchors, divide by the global count.

    An objective says what a batch means to it: ``views`` picks the columns, ``columns`` how many it needs.
    ``optimizer`` takes the module, ``schedule`` the optimizer and the number of steps.
    """

    columns: ClassVar[tuple[int, int]]  # the fewest and the most text columns
    dropout_views: ClassVar[bool] = False

    def __init__(
        self,
        encoder: TextEncoder,
        loss: nn.Module,
        optimizer: Callable[[nn.Module], Optimizer],
        schedule: Callable[[Optimizer, int], LRScheduler],
        mlm: MaskedLM,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.loss = loss
        self.optimizer = optimizer
        self.schedule = schedule
        self.mlm_weight = mlm.weight
        self.mlm = mlm.build(encoder)
        self.stage = "test"
        self.encoding: Encoding

    def views(self, batch: Batch) -> Batch:
        """The views that this objective contrasts."""
        return batch

    def embed(self, batch: Batch) -> Embedded:
        """All views in one forward pass: ``z (V, N, D)``."""
        z = self.encoder(Ragged.cat(batch.views)).unflatten(0, (len(batch.views), len(batch)))
        return Embedded(z, batch.uid, batch.label, batch.position, batch.content)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The value whose gradient, averaged over the processes, is the one of the whole global batch."""
        batch = self.views(batch)
        anchors = self.embed(batch)
        terms = self.loss(anchors, gather(anchors))
        value, logged = mean(Terms(terms.total, terms.count, {**terms.stats, **_alignment(anchors)}))
        logged["uniformity"] = _uniformity(anchors.z[0])
        if self.mlm is not None:
            masked, entropy = mean(self.mlm(Ragged.cat(batch.views)))
            value = value + self.mlm_weight * masked
            logged["mlm_loss"] = entropy["loss"]
        self.log_dict({f"train/{name}": x for name, x in logged.items()}, batch_size=len(batch))
        return value

    def validation_step(self, evaluator: Evaluator, batch_idx: int) -> None:
        """An evaluator is one batch of a validation epoch."""
        self.log_dict(
            {f"val/{name}": x for name, x in self.measure(evaluator).items()}, batch_size=1, rank_zero_only=False
        )

    def test_step(self, evaluator: Evaluator, batch_idx: int) -> None:
        """The same under ``stage``: ``before`` training, ``test`` after it."""
        metrics = self.measure(evaluator)
        self.log_dict({f"{self.stage}/{name}": x for name, x in metrics.items()}, batch_size=1)

    def measure(self, evaluator: Evaluator) -> dict[str, float]:
        """Run an evaluator on the encoder: vectors in the training precision, scores in full."""
        with torch.autocast(self.device.type, enabled=False):
            return evaluator(self.encoding)

    def on_validation_epoch_start(self) -> None:
        """New weights, new vectors."""
        self.encoding = Encoding(self.encoder, self.trainer.precision_plugin.forward_context, progress="evaluating")

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
            raise InputError(
                "The number of steps is not known, so the schedule cannot be laid out. Set trainer.max_steps."
            )
        schedule = self.schedule(optimizer, int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint holds all that the encoder is built from: it can be moved and read alone."""
        checkpoint[KEY] = describe(self.encoder)


@torch.no_grad()
def _alignment(anchors: Embedded) -> dict[str, Tensor]:
    """The sum over rows of ||x - y||^2 of the first two views on the unit sphere (Wang and Isola 2020, eq. 1)."""
    if len(anchors.z) < 2:
        return {}
    x, y = F.normalize(anchors.z[:2].detach().float(), dim=-1)
    return {"alignment": (x - y).square().sum()}


@torch.no_grad()
def _uniformity(z: Tensor) -> Tensor:
    """Log mean over distinct pairs of exp(-2 ||x - y||^2) in this process's batch (Wang and Isola 2020, eq. 2)."""
    x = F.normalize(z.detach().float(), dim=-1)
    if len(x) < 2:
        return x.new_zeros(())
    return (4 * (x @ x.T - 1)).fill_diagonal_(-torch.inf).exp().sum().div(len(x) * (len(x) - 1)).log()
