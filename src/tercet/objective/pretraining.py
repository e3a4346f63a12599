"""Continual pretraining: an encoder goes on learning the language of one's text (Gururangan et al. 2020, arXiv:2004.10964)."""

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from tercet.contract import Batch, Ragged
from tercet.distributed import mean
from tercet.error import InputError
from tercet.model import Encoder
from tercet.objective.contrastive import Contrastive
from tercet.objective.memory import Memory
from tercet.objective.mlm import MaskedLM


class Pretraining(Contrastive):
    """Masked language modelling alone (Devlin et al. 2019, arXiv:1810.04805), on every column: no text is contrasted.

    The folder that it writes is the next stage's ``model.backbone.name``. Pooling and head stay as they are.
    """

    columns: ClassVar[tuple[int, int]] = (1, 3)
    positives: ClassVar[str] = "none"

    def __init__(
        self,
        encoder: Encoder,
        optimizer: Callable[[nn.Module], Optimizer],
        schedule: Callable[[Optimizer, int], LRScheduler],
        mlm: MaskedLM,
    ) -> None:
        if mlm.weight == 0:
            raise InputError("objective.mlm.weight=0: objective=mlm learns nothing else. Use objective.mlm.weight=1.")
        super().__init__(encoder, nn.Identity(), optimizer, schedule, mlm, Memory(size=0, warmup=0))
        for unused in (encoder.head, getattr(encoder.backbone, "pooler", None)):
            if unused is not None:
                unused.requires_grad_(False)  # DDP would wait for what the loss does not reach

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross entropy of the chosen tokens, as the mean over those of the global batch."""
        assert self.mlm is not None
        batch = self.looks(batch)
        value, logged = mean(self.mlm(Ragged.cat([view for view in batch.views if isinstance(view, Ragged)])))
        logged["perplexity"] = logged["loss"].exp()
        self.log_dict({f"train/{name}": x for name, x in logged.items()}, batch_size=len(batch))
        return self.mlm_weight * value
