"""SimCSE: Simple Contrastive Learning of Sentence Embeddings (Gao, Yao and Chen 2021, arXiv:2104.08821)."""

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from tercet.contract import Batch, Ragged
from tercet.error import InputError
from tercet.model import Encoder
from tercet.model.pieces import pieces_of
from tercet.objective.contrastive import Contrastive
from tercet.objective.memory import Memory
from tercet.objective.mlm import MaskedLM
from tercet.view import Pieces, Views


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
        schedule: Callable[[Optimizer, int], LRScheduler],
        mlm: MaskedLM,
        memory: Memory,
        view: Views,
    ) -> None:
        super().__init__(encoder, loss, optimizer, schedule, mlm, memory)
        self.view = view
        if not view.alike:
            self._try(encoder)

    def _try(self, encoder: Encoder) -> None:
        """A backbone or tokenizer that the view cannot be used with is named now."""
        found = pieces_of(encoder)
        if found is None:
            raise InputError("These views change texts, but the model reads images. Use view=dropout.")
        self.pieces = Pieces(*found)
        inputs, ids = encoder.inputs(["One text.", "And another one."]), torch.arange(2)
        with torch.no_grad():
            self.embed(self.views(Batch((inputs,), ids, ids, ids, ids[None])))

    def views(self, batch: Batch) -> Batch:
        """The first column, twice."""
        two = batch.columns(0, 0)
        text = batch.views[0]
        if self.view.alike or not isinstance(text, Ragged):
            return two
        return replace(two, views=self.view(text, batch.uid, self.global_step, self.pieces))


class SimCSESup(Contrastive):
    """Premise and entailment, and optionally a contradiction as the hard negative (section 4): two or three columns."""

    columns: ClassVar[tuple[int, int]] = (2, 3)
