"""Evaluation during training: evaluators run at each validation and test, and their metrics are logged."""

import math
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from tercet.distributed.sharding import gather_weights
from tercet.errors import InputError
from tercet.models import CachedEncoder
from tercet.types import Evaluator

START = "start.ckpt"  # the weights before training


class Evaluation(pl.Callback):
    """Run ``validation`` at each of the trainer's validations and ``test`` at each test, and log their metrics.

    Names are ``val/<metric>``, and ``<stage>/<metric>`` in tests, with the module's attribute ``stage``. Embeddings have the
    training precision, metrics are computed in full precision. All processes take part and get the same metrics.

    With the trainer's ``num_sanity_val_steps`` the weights before training are validated, too, and kept beside the best
    checkpoint as ``start.ckpt``, for ``keeps_start`` to compare. ``validation_rows`` is the number of validated examples.
    """

    def __init__(
        self, validation: Evaluator | None = None, test: Evaluator | None = None, validation_rows: int | None = None
    ) -> None:
        self.validation, self.test, self.validation_rows = validation, test, validation_rows
        self.start: float | None = None  # the monitored metric before training

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Discard cached embeddings: the weights have changed."""
        refresh_encoder(trainer, pl_module)

    on_test_epoch_start = on_validation_epoch_start

    # In the hooks of the one dummy batch: Lightning's progress then shows whether a validation was interrupted.
    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Run the validation and log its metrics, in every process: each needs the monitored metric."""
        self._run(self.validation, pl_module, "val", rank_zero_only=False)

    def on_test_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Run the test and log its metrics."""
        self._run(self.test, pl_module, str(pl_module.stage))

    def _run(self, evaluator: Evaluator | None, pl_module: pl.LightningModule, stage: str, **logging: Any) -> None:
        if evaluator is not None:
            metrics = run_evaluator(evaluator, pl_module, pl_module.cached_encoder)
            pl_module.log_dict({f"{stage}/{name}": value for name, value in metrics.items()}, batch_size=1, **logging)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that the monitored metric exists; without it every checkpoint would be the best."""
        monitor = getattr(trainer.checkpoint_callback, "monitor", None)
        measured = sorted(name for name in trainer.callback_metrics if name.startswith("val/"))
        if monitor and monitor not in measured:
            raise InputError(f"`monitor`={monitor} is not measured in validation. There are: {', '.join(measured)}.")

    def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the weights before training, and log their metrics, which Lightning would drop."""
        best: Any = trainer.checkpoint_callback
        measured = {name: float(x) for name, x in trainer.callback_metrics.items() if name.startswith("val/")}
        if monitor := getattr(best, "monitor", None):
            self.start = measured[monitor]
            trainer.save_checkpoint(Path(best.dirpath) / START, weights_only=True)
        for logger in trainer.loggers:
            logger.log_metrics(measured, step=trainer.global_step)

    def standard_error(self, mode: str = "max") -> float:
        """At most that of the metric before training, m: a mean over n examples of values in [0, 1] has sqrt(m (1 - m) / n).

        0, as not known, of metrics that are better when smaller: distances and losses have no such bounds.
        """
        if mode == "min" or not self.validation_rows:
            return 0.0
        m = self.start or 0.0
        return math.sqrt(max(0.0, m * (1 - m)) / self.validation_rows)

    def keeps_start(self, best: float, mode: str = "max") -> bool:
        """Whether ``best``, of the best checkpoint, is less than a standard error better than the metric before training.

        The one-standard-error rule of Breiman et al. 1984 (Classification and Regression Trees, section 3.4.3): of models that
        validation does not tell apart the simplest, here the one that was there before.
        """
        if self.start is None:
            return False
        gain = best - self.start if mode == "max" else self.start - best
        return not gain > self.standard_error(mode)

    def state_dict(self) -> dict[str, Any]:
        """The metric before training: a resumed run does not measure it again."""
        return {"start": self.start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the metric before training."""
        self.start = state_dict["start"]


def refresh_encoder(trainer: pl.Trainer, module: pl.LightningModule) -> CachedEncoder:
    """Make ``module.cached_encoder`` anew: the module's encoder with its present weights, each item encoded once."""
    encoder = gather_weights(module.encoder)  # type: ignore[arg-type]
    cached = CachedEncoder(encoder, trainer.precision_plugin.forward_context, progress="evaluating")
    module.cached_encoder = cached  # type: ignore[assignment]
    return cached


def run_evaluator(evaluator: Evaluator, module: pl.LightningModule, encode: Any) -> dict[str, float]:
    """The metrics of ``evaluator``, computed without autocast; what it draws leaves torch's random state as it was."""
    devices = [module.device] if module.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.autocast(module.device.type, enabled=False):
        return evaluator(encode)


def validate(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, float]:
    """Validate ``module`` as it is with the trainer's ``Evaluation`` and return the metrics, named ``val/<metric>``."""
    trainer.validate(module, verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}


def evaluate_stage(trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> dict[str, float]:
    """Test ``module`` with the trainer's ``Evaluation`` and return the metrics, named ``<stage>/<metric>``."""
    module.stage = stage  # type: ignore[assignment]
    trainer.test(module, verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(f"{stage}/")}
