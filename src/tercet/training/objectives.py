"""The objectives: SimCSE, FaceNet and Quick-Thoughts."""

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from tercet.distributed import reduce_loss
from tercet.errors import InputError
from tercet.models import Encoder
from tercet.models.text import token_info
from tercet.training.contrastive import Contrastive
from tercet.training.masked_lm import MaskedLM
from tercet.training.memory import Memory
from tercet.types import Batch, Embeddings, TokenBatch
from tercet.views import TokenInfo, Views


class SimCSEUnsup(Contrastive):
    """One text twice: two dropout masks are the two views (section 3), and what ``view`` does to each look.

    Further columns are not looked at.
    """

    columns: ClassVar[tuple[int, int]] = (1, 3)
    dropout_views: ClassVar[bool] = True

    def __init__(
        self,
        encoder: Encoder,
        loss: nn.Module,
        optimizer: Callable[[nn.Module], Optimizer],
        scheduler: Callable[[Optimizer, int], LRScheduler],
        mlm: MaskedLM,
        memory: Memory,
        view: Views,
    ) -> None:
        super().__init__(encoder, loss, optimizer, scheduler, mlm, memory)
        self.view = view
        if not view.identical:
            self._try(encoder)

    def _try(self, encoder: Encoder) -> None:
        """A backbone or tokenizer that the view cannot be used with is named now."""
        found = token_info(encoder)
        if found is None:
            raise InputError("These views change texts, but the model reads images. Use view=dropout.")
        self.pieces = TokenInfo(*found)
        inputs, ids = encoder.prepare(["One text.", "And another one."]), torch.arange(2)
        with torch.no_grad():
            self.embed(self.views(Batch((inputs,), ids, ids, ids, ids[None])))

    def views(self, batch: Batch) -> Batch:
        """The first column, twice."""
        two = batch.select_columns(0, 0)
        text = batch.views[0]
        if self.view.identical or not isinstance(text, TokenBatch):
            return two
        return replace(two, views=self.view(text, batch.example_id, self.global_step, self.pieces))


class SimCSESup(Contrastive):
    """Premise and entailment, and optionally a contradiction as the hard negative (section 4): two or three columns."""

    columns: ClassVar[tuple[int, int]] = (2, 3)


class FaceNet(Contrastive):
    """Rows of equal label are drawn together, all others apart: images or texts, by triplets (section 3).

    One labelled column is the paper's case. Two columns are positives of each other, with or without labels, and a
    third holds negatives for everyone (NLI triplets).
    """

    columns: ClassVar[tuple[int, int]] = (1, 3)
    positives: ClassVar[str] = "label"


class QuickThoughts(Contrastive):
    """f of a sentence finds g of its neighbours (section 3).

    f and g are two towers (``model=towers``), two heads on one trunk (``model.head.kind=two_linear``), or one encoder;
    the embedding of a sentence is [f; g]. One column, whose rows come in order: ``label`` names the document,
    ``position`` the place in it.
    """

    columns: ClassVar[tuple[int, int]] = (1, 1)
    positives: ClassVar[str] = "position"

    def embed(self, batch: Batch) -> Embeddings:
        """``z (2, N, D)``: f and g; the same twice of an encoder that has one side."""
        sides = self.encoder.num_outputs
        z = self.encoder(batch.views[0]).unflatten(-1, (sides, -1)).movedim(1, 0)
        content = batch.content_hash.expand(2, -1)
        return Embeddings(z.expand(2, -1, -1), batch.example_id, batch.label, batch.position, content)


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
        scheduler: Callable[[Optimizer, int], LRScheduler],
        mlm: MaskedLM,
    ) -> None:
        if mlm.weight == 0:
            raise InputError("objective.mlm.weight=0: objective=mlm learns nothing else. Use objective.mlm.weight=1.")
        super().__init__(encoder, nn.Identity(), optimizer, scheduler, mlm, Memory(size=0, warmup=0))
        for unused in (encoder.head, getattr(encoder.backbone, "pooler", None)):
            if unused is not None:
                unused.requires_grad_(False)  # DDP would wait for what the loss does not reach

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross entropy of the chosen tokens, as the mean over those of the global batch."""
        assert self.mlm is not None
        batch = self.training_views(batch)
        value, logged = reduce_loss(self.mlm(TokenBatch.concat([view for view in batch.views if isinstance(view, TokenBatch)])))
        logged["perplexity"] = logged["loss"].exp()
        self.log_dict({f"train/{name}": x for name, x in logged.items()}, batch_size=len(batch))
        return self.mlm_weight * value
