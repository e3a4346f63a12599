"""``sweep=optuna``: a search over settings with so many trials, by Optuna, which remembers them in a file.

Hydra's own plugin for Optuna (1.3) asks for optuna below 3 and cannot prune: this is the library behind the same
configuration. It stands here because Hydra takes sweepers from this package alone.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from tercet.errors import InputError

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution


DIRECTIONS = ("maximize", "minimize")


class OptunaSweeper(Sweeper):
    """``trials`` jobs, ``jobs`` at a time; ``params`` and the command line say what is searched.

    ``interval(1e-5, 1e-3)``, with ``tag(log, …)`` on a logarithmic scale; ``range(1, 5)``; ``choice(cls, mean)`` or a list.
    The value of a trial is ``optimized_metric``. The study is ``study.db`` in the sweep's folder: the same command there
    makes what is missing of ``trials``. With a ``monitor`` a trial that validates worse than the median of the earlier
    ones is stopped (``prune``).
    """

    def __init__(
        self,
        trials: int,
        jobs: int,
        direction: str,
        seed: int,
        prune: bool,
        params: dict[str, str],
    ) -> None:
        if direction not in DIRECTIONS:
            raise InputError(f"hydra.sweeper.direction={direction}: choose one of {', '.join(DIRECTIONS)}.")
        self.trials, self.jobs, self.direction, self.seed, self.prune = trials, jobs, direction, seed, prune
        self.params = dict(params or {})
        self.cfg = DictConfig({})
        self.run: Any = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """What Hydra hands over."""
        self.cfg = config
        self.run = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Ask, run, tell."""
        import optuna

        from tercet.messages import print_status

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        searched, fixed = self._searched(arguments)
        folder = Path(self.cfg.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.cfg, folder / "multirun.yaml")
        storage = f"sqlite:///{folder.resolve() / 'study.db'}"
        study = optuna.create_study(
            study_name="sweep", storage=storage, load_if_exists=True,
            direction="maximize" if self.direction == "maximize" else "minimize", pruner=optuna.pruners.MedianPruner(),
        )  # fmt: skip
        # Not the same draws again where the search goes on.
        study.sampler = optuna.samplers.TPESampler(seed=self.seed + len(study.trials))
        said = "trials are there, of" if study.trials else "trials will be made of"
        print_status(f"{len(study.trials) or self.trials} {said} {self.trials}; {storage}")
        while left := self.trials - len([t for t in study.trials if t.state.is_finished()]):
            if left < 0:
                break
            trials = [study.ask(searched) for _ in range(min(left, self.jobs))]
            self._run(study, trials, fixed, storage)
        if study.best_trials:
            best = study.best_trial
            chosen = " ".join(f"{name}={value}" for name, value in best.params.items())
            print_status(f"best of {len(study.trials)} trials: number {best.number}, {best.value:.4f} with {chosen}")

    def _run(self, study: "Study", trials: Sequence["Trial"], fixed: list[str], storage: str) -> None:
        from optuna.trial import TrialState

        jobs = [[*fixed, *(f"{name}={value}" for name, value in t.params.items()), *self._pruning(t, storage)] for t in trials]
        for trial, job in zip(trials, self.run.launch(jobs, initial_job_idx=trials[0].number), strict=True):
            value: Any = job.return_value
            if value is None:
                study.tell(trial, state=TrialState.FAIL)
                raise InputError("sweep=optuna searches for the best optimized_metric, which is null: name one, as "
                                 "optimized_metric=test/sts/avg/spearman_all.")  # fmt: skip
            if math.isnan(value):
                study.tell(trial, state=TrialState.FAIL)
            elif "pruned" in trial.user_attrs:
                study.tell(trial, state=TrialState.PRUNED)
            else:
                study.tell(trial, value)

    def _pruning(self, trial: "Trial", storage: str) -> list[str]:
        if not self.prune or not OmegaConf.select(self.cfg, "monitor"):
            return []
        at = "+callback.prune"
        return [f"{at}._target_=tercet.app.sweeps.pruning.OptunaPruning", f"{at}.storage={storage}", f"{at}.number={trial.number}",
                f"{at}.monitor={self.cfg.monitor}"]  # fmt: skip

    def _searched(self, arguments: list[str]) -> tuple[dict[str, "BaseDistribution"], list[str]]:
        """Distributions of the keys that sweep, and the overrides that do not."""
        typed = OverridesParser.create().parse_overrides(arguments)
        given = {override.key_or_group for override in typed}
        more = OverridesParser.create().parse_overrides([f"{k}={v}" for k, v in self.params.items() if k not in given])
        searched = {o.get_key_element(): distribution(o) for o in (*more, *typed) if o.is_sweep_override()}
        if not searched:
            raise InputError("sweep=optuna: nothing is searched. Give an interval, as 'optimizer.lr=interval(1e-5,1e-3)'.")
        return searched, [o.input_line for o in (*more, *typed) if not o.is_sweep_override() and o.input_line]


def distribution(override: Override) -> "BaseDistribution":
    """What Optuna draws from."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    value: Any = override.value()
    if isinstance(value, IntervalSweep):
        return FloatDistribution(float(value.start or 0), float(value.end or 0), log="log" in value.tags)
    if isinstance(value, RangeSweep):
        return CategoricalDistribution([str(x) for x in value.range()])
    assert isinstance(value, ChoiceSweep)
    return CategoricalDistribution([str(x) for x in override.sweep_string_iterator()])
