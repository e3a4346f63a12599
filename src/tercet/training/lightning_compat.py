"""All uses of private interfaces of Lightning and torch's optimizers; tests/training/test_lightning_compat.py checks each."""

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Timer
from pytorch_lightning.loops.evaluation_loop import RestartStage
from pytorch_lightning.strategies import ModelParallelStrategy, StrategyRegistry
from torch.distributed.tensor import DTensor
from torch.optim import SGD, Adagrad, Adam, Optimizer
from torch.utils.data import DataLoader

FSDP2 = "fsdp2"


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's FSDP2 over all processes; a checkpoint is one file with whole weights, as without sharding."""

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Set the size of the mesh: the number of processes is known only here."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


StrategyRegistry.register(FSDP2, FSDP2Strategy, description="FSDP2 over all processes")


class EvaluationHooks:
    """A loader of one dummy batch and a step that does nothing, for Lightning to test: the ``Evaluation`` callback does it."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Do nothing."""

    def val_dataloader(self) -> "DataLoader[int]":
        """One dummy batch; without its own generator the loader would draw from torch's, which training uses."""
        return DataLoader([0], batch_size=None, generator=torch.Generator())  # type: ignore[arg-type]

    test_step, test_dataloader = validation_step, val_dataloader


def progress_of_epoch(trainer: pl.Trainer | None) -> tuple[int, int, int]:
    """The number of batches that the epoch has had, that of the run's steps, and of batches a step; outside a fit 0, 0, 1."""
    if trainer is None:
        return 0, 0, 1
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return progress.processed, trainer.global_step, trainer.accumulate_grad_batches


def epoch_and_batches(trainer: pl.Trainer | None) -> tuple[int, int]:
    """The epoch and how many of its batches are processed; between two epochs the next one and 0, as outside a fit."""
    progress: Any = trainer.fit_loop.epoch_progress.current if trainer else None
    if progress is None or progress.processed > progress.completed:
        return (progress.processed if progress else 0), 0
    return progress.completed, progress_of_epoch(trainer)[0]


def time_limit(trainer: pl.Trainer) -> Timer | None:
    """The clock of ``max_time``, which counts the time of earlier parts of a resumed run; None without a limit."""
    return next((c for c in trainer.callbacks if isinstance(c, Timer) and c.time_remaining() is not None), None)  # type: ignore[attr-defined]


def elapsed_share(trainer: pl.Trainer) -> Callable[[], float] | None:
    """A function: the share of ``max_time`` that has passed, 0 to 1, the same in all processes; None without a limit."""
    timer = time_limit(trainer)
    if timer is None:
        return None

    def share() -> float:
        elapsed, left = timer.time_elapsed(), timer.time_remaining() or 0.0
        return float(trainer.strategy.broadcast(min(1.0, elapsed / max(elapsed + left, 1e-9))))

    return share


def logs_now(trainer: pl.Trainer | None) -> bool:
    """Whether the values of the current batch are written, or are the last ones of an epoch or a run; True outside a fit.

    In the other steps nothing has to be computed for them: on a GPU each value costs several kernels.
    """
    loop: Any = getattr(trainer, "fit_loop", None)
    if trainer is None or loop is None or trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
        return True
    step = loop.epoch_loop._batches_that_stepped + 1  # of this batch, before and after the optimizer's step
    return step == 1 or step == trainer.max_steps or trainer.is_last_batch or step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]


def begin_next_epoch(trainer: pl.Trainer) -> None:
    """After resuming from a checkpoint of the end of an epoch, go on with the next one; to be called before the first epoch.

    Lightning would count one epoch more: where ``max_steps`` is set and the checkpoint was written after the epoch, and where
    it was written after the last batch of a stream. Of other rows it begins the next epoch without counting its start.
    """
    loop = trainer.fit_loop
    progress, batches = loop.epoch_progress, loop.epoch_loop
    if loop.restarted_mid_epoch and batches.restarted_on_train_batch_end and batches.batch_progress.is_last_batch:
        counts: Any
        for counts in (progress.total, progress.current):
            if trainer.num_training_batches == float("inf"):  # it is still to end, with a validation if one is due
                counts.processed, counts.completed = counts.processed - 1, counts.completed - 1
            else:
                counts.ready, counts.started = counts.ready + 1, counts.started + 1
    if loop.restarted_on_epoch_end:
        loop.epoch_progress.increment_completed()
        loop._restarting = loop.epoch_loop.restarting = False
        loop.reset_restart_stage()


def restart_validation(trainer: pl.Trainer) -> None:
    """After resuming, run a validation again that was interrupted, or that was due after the checkpoint's step.

    Lightning takes the second for done, and continues the first in the middle without the metrics of its first part.
    """
    loop = trainer.fit_loop.epoch_loop
    progress = loop.val_loop.batch_progress
    if loop.restarted_on_train_batch_end or (loop.restarting and progress.current.ready > progress.current.completed):
        progress.reset_on_run()
        loop.val_loop._restart_stage = RestartStage.RESTARTED_MID_EVALUATION


def forget_pending_batches(checkpoint: dict[str, Any], pending: int) -> None:
    """Subtract ``pending`` batches from a checkpoint's progress: their accumulated gradient is not saved.

    Of none, forget a batch that was begun and not processed: it is drawn again, and Lightning would count it twice.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    if progress["current"]["ready"] > progress["current"]["processed"]:
        progress["is_last_batch"] = False  # that of the one which was begun
    for counts in (progress["total"], progress["current"]):
        counts.update(dict.fromkeys(counts if pending else ("ready", "started"), counts["processed"] - pending))


def keep_signal_handlers(trainer: pl.Trainer) -> None:
    """Let a trainer install no handler of signals, but restore those of its start at its end.

    Its own handler of SIGTERM begins a broadcast, wherever the process is, and hangs.
    """
    connector = trainer._signal_connector

    def remember() -> None:
        connector._original_handlers = connector._get_current_signal_handlers()

    connector.register_signal_handlers = remember  # type: ignore[method-assign]


def injects_distributed_sampler(trainer: pl.Trainer) -> bool:
    """Whether Lightning would split the batches among the processes a second time."""
    connector = trainer._accelerator_connector
    return bool(connector.use_distributed_sampler and connector.is_distributed)


def skip_on_device(optimizer: Optimizer, skip: torch.Tensor) -> bool:
    """Let the next step change nothing if ``skip``, a scalar of the device, is true. False where the optimizer cannot.

    Fused Adam, AdamW and SGD leave weights and state as they are; SGD needs momentum from before, as ``sgd`` gives it: where
    its first step is skipped, momentum is whatever was in that memory. A gradient of zeros moves neither AdaGrad, nor SGD
    without momentum, where weights do not decay.
    """
    groups = optimizer.param_groups
    fused = all(group.get("fused") for group in groups)
    weights = [p for group in groups for p in group["params"] if p.grad is not None]
    if fused and isinstance(optimizer, SGD):
        fused = not any(group["momentum"] for group in groups) or all("momentum_buffer" in optimizer.state[p] for p in weights)
    if fused and isinstance(optimizer, Adam | SGD):
        optimizer.found_inf = skip.float()  # type: ignore[union-attr]
        return True
    moves = any(group["weight_decay"] or group.get("momentum") for group in groups)
    if moves or not isinstance(optimizer, Adagrad | SGD) or any(isinstance(p, DTensor) for p in weights):
        return False
    for p in weights:
        p.grad.masked_fill_(skip, 0)
    return True


def let_scaler_unscale(optimizer: Optimizer) -> None:
    """Leave undoing the fp16 loss scale to the scaler, as Lightning's gradient clipping requires; fused AdamW would do it."""
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
