"""End a run after a whole step at SIGTERM and Ctrl-C, in all processes after the same step."""

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
    """Complete the step, save a checkpoint and end the run at SIGTERM or Ctrl-C.

    Lightning would end in the middle of an optimizer step at Ctrl-C. At SIGTERM its processes broadcast from wherever they are,
    while others are in another collective operation, and all of them hang. Here the signal is recorded, and after each step the
    processes exchange whether one of them has received a signal. A second Ctrl-C ends a single process at once. Evaluations
    have nothing to save and end at once.
    """

    def __init__(self) -> None:
        self.received = 0  # the number of the signal
        self.stepping = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Install the handlers, after Lightning's; at the end Lightning restores what was there before its own."""
        if trainer.world_size > 1:
            _install(self._record, signal.SIGTERM, signal.SIGINT)
        elif signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # otherwise it is ignored, or the user's own
            _install(self._stop_after_step, signal.SIGINT)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let a signal end an evaluation at once."""
        if trainer.world_size > 1:
            _install(_stop, signal.SIGTERM, signal.SIGINT)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """A step begins."""
        self.stepping = True

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop where any process has received a signal."""
        self.stepping = False
        number = self.received
        if trainer.world_size > 1:
            received = torch.tensor(number, device=trainer.strategy.root_device)
            number = int(trainer.strategy.reduce(received, reduce_op="max"))
        if number:
            _stop(number, None)

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.received = max(self.received, number)

    def _stop_after_step(self, number: int, frame: FrameType | None) -> None:
        if self.received or not self.stepping:
            _stop(number, frame)
        self.received = number
        warn_once("Ctrl-C: the run is saved after this step. Press it again to end now.")


def _install(handler: Callable[[int, FrameType | None], None], *numbers: int) -> None:
    if threading.current_thread() is threading.main_thread():
        for number in numbers:
            signal.signal(number, handler)


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt if number == signal.SIGINT else SIGTERMException
