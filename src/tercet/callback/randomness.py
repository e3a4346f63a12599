"""A run that goes on draws what it would have drawn."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from tercet.distributed import rank


class Randomness(pl.Callback):
    """Keeps torch's random state in checkpoints and puts it back before the first step; Lightning keeps none.

    It is that of the last step, and so is the place in the data: a gradient that is still being added up
    (``accumulate_grad_batches``) is not kept, and its batches will be drawn again. A checkpoint holds the first process's
    state; each of the others writes its own beside it, ``random-<rank>.pt``. Where that is not of the checkpoint's step
    they draw what they start with from the first one's: no two draw alike.
    """

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}
        self.step = torch.tensor(0)
        self.kept: dict[str, Tensor] = {}
        self.pending = 0  # batches since the last step
        self.folder = Path()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Where the checkpoints are."""
        self.folder = Path(trainer.default_root_dir) / "checkpoints"

    def state_dict(self) -> dict[str, Any]:
        """As it was between the last two steps: one that is interrupted will be made again."""
        if rank() and self.kept:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = self.folder / f".random-{rank()}.pt"
            torch.save({**self.kept, "step": self.step}, partial)
            partial.replace(self.folder / f"random-{rank()}.pt")
        return {**self.kept, "step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Not put back yet: what is built until the first step draws, too."""
        self.found = dict(state_dict)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Put back once; kept for each step."""
        if self.found:
            self._put_back()
        self._keep(trainer, batch_idx % trainer.accumulate_grad_batches)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The step is made, or one batch nearer."""
        self._keep(trainer, 0 if trainer.is_last_batch else (batch_idx + 1) % trainer.accumulate_grad_batches)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Lightning counts every batch; those of a gradient that is not kept are taken back."""
        if not self.pending or "loops" not in checkpoint:
            return
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):
            counts.update(dict.fromkeys(counts, counts["processed"] - self.pending))
        if "done" in (place := checkpoint.get(type(trainer.datamodule).__qualname__, {})):  # type: ignore[attr-defined]
            place["done"] -= self.pending

    def _keep(self, trainer: pl.Trainer, pending: int) -> None:
        self.pending = pending
        if not pending:
            self.kept, self.step = _states(), torch.tensor(trainer.global_step)

    def _put_back(self) -> None:
        own = self.folder / f"random-{rank()}.pt"
        mine = torch.load(own, map_location="cpu", weights_only=True) if rank() and own.is_file() else self.found
        step, own_step = self.found.get("step"), mine.get("step")  # None in checkpoints of before this was kept
        same = step is not None and own_step is not None and torch.equal(own_step.cpu(), step.cpu())
        states = mine if same else self.found
        torch.set_rng_state(states["cpu"].cpu())
        if "cuda" in states and torch.cuda.is_available():
            torch.cuda.set_rng_state(states["cuda"].cpu())
        if rank() and states is self.found:
            torch.manual_seed(int(torch.randint(1 << 62, (rank(),))[-1]))
        self.found = {}


def _states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})
