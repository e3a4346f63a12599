"""``sweep=optuna``: a search over settings with Optuna, which stores its trials in a file.

Hydra's own Optuna plugin (1.3) needs optuna below 3 and cannot prune. Imports here are light: Hydra loads this at every start.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from tercet.app.hydra_compat import parse_overrides, swept_values
from tercet.errors import check_choice, require

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution

Direction = Literal["maximize", "minimize"]
MODES: dict[str, Direction] = {"max": "maximize", "min": "minimize"}
STUDY = "sweep"  # its name in study.db


class OptunaSweeper(Sweeper):
    """Run ``trials`` jobs, ``jobs`` at a time, and search for the best ``optimized_metric``.

    ``params`` and the command line say what is searched: ``interval(1e-5, 1e-3)``, ``tag(log, interval(…))`` for a
    logarithmic scale, ``range(1, 5)``, ``choice(cls, mean)`` or a list. The study is ``study.db`` in the sweep's folder: the
    same command there makes the trials that are missing. Without a ``direction`` the metric's own is taken.
    """

    def __init__(self, trials: int, jobs: int, direction: Direction | None, seed: int, params: dict[str, str]) -> None:
        check_choice("hydra.sweeper.direction", direction or "maximize", get_args(Direction))
        self.trials, self.jobs, self.direction, self.seed = trials, jobs, direction, seed
        self.params = dict(params or {})

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take the configuration and build the launcher of the jobs (Hydra calls it)."""
        self.cfg = config
        self.launcher: Any = Plugins.instance().instantiate_launcher(hydra_context, task_function, config)

    def sweep(self, arguments: list[str]) -> None:
        """Sample settings, run them and report their results to the study, until it has ``trials`` finished trials."""
        import optuna

        from tercet.app.config_checks import monitor_mode
        from tercet.messages import print_status
        from tercet.paths import write_text

        direction = self.direction or MODES[monitor_mode(self.cfg, str(self.cfg.optimized_metric)) or "max"]
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        space, fixed = self._split_arguments(arguments)
        folder = Path(self.cfg.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "multirun.yaml", OmegaConf.to_yaml(self.cfg))
        storage = study_url(folder / "study.db")
        study = optuna.create_study(study_name=STUDY, storage=storage, load_if_exists=True, direction=direction)
        # A study that goes on must not repeat its first samples.
        study.sampler = optuna.samplers.TPESampler(seed=self.seed + len(study.trials))
        print_status(f"{len(study.trials)} of {self.trials} trials are there; the study is {storage}")
        while (left := self.trials - sum(trial.state.is_finished() for trial in study.trials)) > 0:
            self._run(study, [study.ask(space) for _ in range(min(left, self.jobs))], fixed)
        if study.best_trials:
            best = study.best_trial
            chosen = " ".join(f"{name}={value}" for name, value in best.params.items())
            print_status(f"best of {len(study.trials)} trials: number {best.number}, {best.value:.4f} with {chosen}")

    def _run(self, study: "Study", trials: Sequence["Trial"], fixed: list[str]) -> None:
        from optuna.trial import TrialState

        jobs = [[*fixed, *(f"{name}={value}" for name, value in trial.params.items())] for trial in trials]
        for trial, job in zip(trials, self.launcher.launch(jobs, initial_job_idx=trials[0].number), strict=True):
            value: Any = job.return_value
            pruned, failed = "pruned" in trial.user_attrs, value is None or math.isnan(value)
            state = TrialState.FAIL if failed else TrialState.PRUNED if pruned else TrialState.COMPLETE
            study.tell(trial, value if state == TrialState.COMPLETE else None, state)
            need = "name one, as optimized_metric=val/sts/stsb/spearman."
            require(value is not None, f"sweep=optuna searches for the best optimized_metric, which is null: {need}")

    def _split_arguments(self, arguments: list[str]) -> tuple[dict[str, "BaseDistribution"], list[str]]:
        """Distributions of the keys that are searched, and the overrides that are the same in all trials."""
        typed = parse_overrides(arguments)
        given = {override.key_or_group for override in typed}
        overrides = [*parse_overrides([f"{k}={v}" for k, v in self.params.items() if k not in given]), *typed]
        space = {o.get_key_element(): to_distribution(o) for o in overrides if o.is_sweep_override()}
        require(space, "sweep=optuna: nothing is searched. Give an interval, as 'optimizer.lr=interval(1e-5,1e-3)'.")
        return space, [o.input_line for o in overrides if not o.is_sweep_override() and o.input_line]


def study_url(file: str | Path) -> str:
    """The address of the study in a file, whose path may hold what means something in an address."""
    from sqlalchemy.engine import URL

    return URL.create("sqlite", database=str(Path(file).resolve())).render_as_string()


def to_distribution(override: Override) -> "BaseDistribution":
    """Optuna's distribution for an override that sweeps."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    value: Any = override.value()
    if isinstance(value, IntervalSweep):
        return FloatDistribution(float(value.start or 0), float(value.end or 0), log="log" in value.tags)
    return CategoricalDistribution(swept_values(override))


def pruning_callback(study: str, number: int, monitor: str | None, mode: str = "max") -> "pl.Callback":
    """A callback that reports ``monitor`` to trial ``number`` after each validation, and stops training if it is pruned.

    ``study`` is the file of the search. Optuna's median rule: a trial whose value is worse than the median of the earlier
    trials at the same step is stopped.
    """
    from pytorch_lightning.callbacks import LambdaCallback

    def report(trainer: "pl.Trainer", _: "pl.LightningModule") -> None:
        fits = monitor and trainer.state.fn == "fit" and trainer.is_global_zero  # not the validation after training
        value = trainer.callback_metrics.get(f"{monitor}") if fits else None
        stop = value is not None and _report(study_url(study), number, f"{monitor}", float(value), mode, trainer.global_step)
        if trainer.strategy.broadcast(stop):  # the first process decides for all
            trainer.should_stop = True

    return LambdaCallback(on_validation_end=report)


def _report(storage: str, number: int, monitor: str, value: float, mode: str, step: int) -> bool:
    import optuna

    from tercet.messages import warn_once

    store = optuna.storages.RDBStorage(storage)
    trial_id = store.get_trial_id_from_study_id_trial_number(store.get_study_id_from_name(STUDY), number)
    study = optuna.load_study(study_name=STUDY, storage=store)
    trial = optuna.Trial(study, trial_id)
    same = study.direction.name.lower() == MODES[mode]  # of the monitored and of the optimized metric
    trial.report(value if same else -value, step)
    if stop := trial.should_prune():
        trial.set_user_attr("pruned", step)
        warn_once(f"trial {number} is stopped at step {step}: {monitor} is worse than the median.")
    return stop
