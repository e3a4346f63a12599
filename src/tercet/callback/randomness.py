"""A run that goes on draws what it would have drawn."""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from tercet.distributed import rank


class Randomness(pl.Callback):
    """Keeps torch's random state in checkpoints and puts it back before the first step; Lightning keeps none.

    A checkpoint holds the first process's state. The others draw from it what they start with: no two draw alike, but
    what they draw is not what they would have drawn.
    """

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}
        self.kept: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        """As it was between the last two steps: one that is interrupted will be made again."""
        return dict(self.kept)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Not put back yet: what is built until the first step draws, too."""
        self.found = dict(state_dict)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Put back once; kept for each step."""
        if self.found:
            self._put_back()
        self.kept = _states()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The step is made."""
        self.kept = _states()

    def _put_back(self) -> None:
        torch.set_rng_state(self.found["cpu"].cpu())
        if "cuda" in self.found and torch.cuda.is_available():
            torch.cuda.set_rng_state(self.found["cuda"].cpu())
        if rank():
            torch.manual_seed(int(torch.randint(1 << 62, (rank(),))[-1]))
        self.found = {}


def _states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})
