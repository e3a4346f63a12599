"""A trial of a search that is worse than the others so far is stopped."""

import pytorch_lightning as pl

from tercet.messages import warn_once


class OptunaPruning(pl.Callback):
    """Reports ``monitor`` of each validation to trial ``number`` of Optuna's study in ``storage``, and stops where it says so.

    ``sweep=optuna`` puts it there.
    """

    def __init__(self, storage: str, number: int, monitor: str) -> None:
        self.storage, self.number, self.monitor = storage, number, monitor

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The first process decides, all stop."""
        import optuna

        stop = False
        if trainer.is_global_zero and self.monitor in trainer.callback_metrics:
            study = optuna.load_study(study_name="sweep", storage=self.storage)
            trial = optuna.Trial(study, study.get_trials(deepcopy=False)[self.number]._trial_id)
            trial.report(float(trainer.callback_metrics[self.monitor]), trainer.global_step)
            if stop := trial.should_prune():
                trial.set_user_attr("pruned", trainer.global_step)
                warn_once(f"trial {self.number} is stopped at step {trainer.global_step}: {self.monitor} is below the median.")
        if trainer.strategy.broadcast(stop):
            trainer.should_stop = True
