"""Which way a metric is better: evaluators declare it, and everything that compares two values follows."""

import pytest
from omegaconf import OmegaConf

from tercet.app.commands.compare import Comparison, Run, ranking_table
from tercet.app.commands.stages import stage_table
from tercet.app.config_checks import monitor_mode, set_monitor_mode
from tercet.app.report import run_result
from tercet.errors import InputError
from tercet.evaluation import EvaluatorGroup, direction
from tercet.training.callbacks import Evaluation
from tests.conftest import composed

DEV = ["evaluation@validation=stsb_dev", "callback=early_stopping"]
OWN = {"_target_": "tests.app.test_monitor.Undeclared"}


class Undeclared:
    """An evaluator of somebody's own."""

    def __call__(self, encode):
        """One metric."""
        return {"own/errors": 1.0}


class Declared(Undeclared):
    """The same, with its direction."""

    smaller_is_better = frozenset({"errors"})


def settings(*overrides, validation=None):
    cfg = OmegaConf.create(OmegaConf.to_container(composed(*DEV, *overrides), resolve=True))
    if validation:
        cfg.validation = validation
    set_monitor_mode(cfg)
    return cfg


@pytest.mark.parametrize(
    ("metric", "mode"),
    [("sts/stsb/spearman", "max"), ("sts/stsb/alignment", "min"), ("alignment_uniformity/text/uniformity", "min"),
     ("verification/lfw/eer", "min"), ("verification/lfw/val@far1e-3", "max"), ("retrieval/text/recall@1", "max")],
)  # fmt: skip
def test_the_best_checkpoint_and_early_stopping_follow_the_metric(metric, mode):
    cfg = settings(f"monitor=val/{metric}")
    assert (cfg.monitor_mode, cfg.callback.best.mode, cfg.callback.early_stopping.mode) == (mode, mode, mode)
    assert monitor_mode(cfg, f"val/{metric}") == mode


def test_an_unknown_metric_needs_its_direction():
    with pytest.raises(
        InputError, match=r"monitor=val/own/errors: .* as Undeclared does not .*Set monitor_mode=max or monitor_mode=min"
    ):
        settings("monitor=val/own/errors", validation=OWN)
    with pytest.raises(InputError, match="Set monitor_mode=max"):
        settings("monitor=val/own/errors", validation={"members": {"one": OWN, "none": None}})
    given = settings("monitor=val/own/errors", "monitor_mode=min", validation=OWN)
    assert given.callback.best.mode == "min" and "errors" in given.smaller_is_better
    declared = settings("monitor=val/own/errors", validation={"_target_": "tests.app.test_monitor.Declared"})
    assert declared.callback.best.mode == "min" and "errors" in declared.smaller_is_better
    assert settings("monitor_mode=max", "monitor=val/sts/stsb/alignment").callback.best.mode == "max"
    with pytest.raises(InputError, match="monitor_mode=up: choose max, min, or null"):
        settings("monitor_mode=up")


def test_every_evaluator_declares_its_direction():
    for name in direction.__dict__["EVALUATORS"]:
        assert isinstance(name.smaller_is_better, frozenset)
    assert not hasattr(EvaluatorGroup({}), "smaller_is_better"), "a group is what its members are"


def test_the_start_is_kept_unless_less_is_measured():
    evaluation = Evaluation(validation_rows=48)
    evaluation.start = 0.75
    assert [evaluation.keeps_start(best, "min") for best in (0.75, 0.76, 0.74, float("nan"))] == [True, True, False, True]


def test_comparisons_and_reports_follow(tmp_path):
    runs = {(name,): [Run(tmp_path / name, 1, {"test/own/errors": value}, {}, "", None, frozenset({"errors"}))]
            for name, value in (("a", 3.0), ("b", 1.0), ("c", 2.0))}  # fmt: skip
    compared = Comparison(("lr",), runs)
    assert [setting for (setting,) in compared.rank("test/own/errors")] == ["b", "c", "a"]
    assert ranking_table(compared, "test/own/errors").startswith("test/own/errors, less is better")
    cfg = OmegaConf.create(
        {"expected": {}, "optimized_metric": None, "monitor": None, "command": [], "smaller_is_better": ["errors"]}
    )
    worse = run_result(cfg, {"test/own/errors": 2.0}, {"own/errors": 1.0}, {"own/errors": 2.0})
    assert worse.headline.startswith("Worse than before training: own/errors")
    columns = {"before": {"x/alignment": 0.5}, "one": {"x/alignment": 0.25}, "two": {"x/alignment": 0.75}}
    forgotten = stage_table(columns, "x/alignment", "x/alignment").splitlines()
    assert forgotten[2].split()[-3:] == ["0.0000", "-0.2500", "0.2500"]
    assert forgotten[3].split()[-3:] == ["0.0000", "0.0000", "0.5000"]
