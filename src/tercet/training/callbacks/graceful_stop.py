"""SIGTERM and Ctrl-C end a run after a step, and all of its processes after the same one."""

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import SIGTERMException

from tercet.messages import warn_once


class GracefulStop(pl.Callback):
    """Lets a step be made before a run is saved and left.

    Lightning would leave from the middle of an optimizer's step at Ctrl-C; and at SIGTERM have each of several processes
    broadcast from where it is, while another is in another collective, and both wait. Here the signal is noted, and after
    a step the processes ask whether anybody has had one. A second Ctrl-C ends a process alone at once. A measurement has
    nothing to save and ends at once.
    """

    def __init__(self) -> None:
        self.asked = 0
        self.stepping = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lightning's own handlers are there by now, and it puts back at the end what was there before them."""
        if trainer.world_size > 1:
            _listen(self._note, signal.SIGTERM, signal.SIGINT)
        elif signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, or somebody's own
            _listen(self._finish, signal.SIGINT)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Nobody waits for the others."""
        if trainer.world_size > 1:
            _listen(_leave, signal.SIGTERM, signal.SIGINT)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """From here the weights are in the making."""
        self.stepping = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The same answer in every process."""
        self.stepping = False
        number = self.asked
        if trainer.world_size > 1:
            asked = torch.tensor(number, device=trainer.strategy.root_device)
            number = int(trainer.strategy.reduce(asked, reduce_op="max"))
        if number:
            _leave(number, None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = max(self.asked, number)

    def _finish(self, number: int, frame: FrameType | None) -> None:
        if self.asked or not self.stepping:
            _leave(number, frame)
        self.asked = number
        warn_once("Ctrl-C: the run is saved after this step. Once more ends it now.")


def _listen(handler: Callable[[int, FrameType | None], None], *numbers: int) -> None:
    if threading.current_thread() is threading.main_thread():
        for number in numbers:
            signal.signal(number, handler)


def _leave(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt if number == signal.SIGINT else SIGTERMException
