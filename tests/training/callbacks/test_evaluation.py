"""Evaluators run at each validation and test, on the present weights, and their metrics are logged."""

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from torch.utils.data import DataLoader

from tercet.errors import InputError
from tercet.training import SimCSEUnsup
from tercet.training.callbacks import Evaluation, EvaluatorFigures
from tercet.training.callbacks.evaluation import evaluate_stage
from tercet.types import Batch
from tests.conftest import TEXTS

pytestmark = pytest.mark.filterwarnings("ignore")


class Recorder:
    """An evaluator that remembers the embeddings it has seen."""

    def __init__(self):
        self.seen, self.drawn = [], 0

    def __call__(self, encode):
        assert not torch.is_autocast_enabled("cpu")
        self.seen.append(encode(TEXTS[:2]))
        return {"suite/score": float(len(self.seen))}

    def figures(self, encode):
        assert torch.equal(encode(TEXTS[:2]), self.seen[-1])
        self.drawn += 1
        return {}


def batch(encoder):
    ids = torch.arange(len(TEXTS))
    return Batch((encoder.prepare(TEXTS),), ids, ids, ids, ids[None])


def trainer(tmp_path, callbacks, **settings):
    return pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks,
        default_root_dir=tmp_path, **{"max_steps": 4, "val_check_interval": 2, "num_sanity_val_steps": 0, **settings},
    )  # fmt: skip


def fit(runner, encoder):
    module = SimCSEUnsup(encoder)
    runner.fit(module, DataLoader([batch(encoder)] * 4, batch_size=None))
    return module


def test_metrics_are_logged_and_select_checkpoints(tmp_path, encoder):
    """Without a data module, without configuration: all defaults."""
    validation, test = Recorder(), Recorder()
    best = ModelCheckpoint(tmp_path, filename="{step}", monitor="val/suite/score", mode="max")
    runner = trainer(tmp_path, [Evaluation(validation, test), best, EvaluatorFigures()])
    module = fit(runner, encoder)
    assert float(runner.callback_metrics["val/suite/score"]) == 2.0
    assert float(best.best_model_score) == 2.0 and best.best_model_path.endswith("step=4.ckpt")
    assert not torch.equal(*validation.seen), "each validation has the embeddings of the present weights"
    assert evaluate_stage(runner, module, "test") == {"test/suite/score": 1.0}
    assert evaluate_stage(runner, module, "before") == {"before/suite/score": 2.0}
    assert torch.equal(*test.seen) and (validation.drawn, test.drawn) == (2, 1), "no figures before training"


def test_the_weights_before_training_are_validated_and_kept(tmp_path, encoder):
    before = {name: x.clone() for name, x in encoder.state_dict().items()}
    evaluation = Evaluation(Recorder(), validation_rows=50)
    best = ModelCheckpoint(tmp_path, filename="best", monitor="val/suite/score", mode="max")
    runner = trainer(tmp_path, [evaluation, best], num_sanity_val_steps=1)
    module = fit(runner, encoder)
    assert evaluation.start == 1.0 and float(best.best_model_score) == 3.0
    kept = torch.load(tmp_path / "start.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(kept[f"encoder.{name}"], x) for name, x in before.items())
    assert any(not torch.equal(x, before[name]) for name, x in module.encoder.state_dict().items())
    resumed = Evaluation(Recorder())
    resumed.load_state_dict(evaluation.state_dict())
    assert resumed.start == 1.0


def test_the_start_is_kept_unless_it_is_beaten_by_a_standard_error():
    evaluation = Evaluation(Recorder(), validation_rows=48)
    assert not evaluation.keeps_start(0.0), "the start was not measured"
    evaluation.start = 0.75
    assert evaluation.standard_error() == pytest.approx((0.75 * 0.25 / 48) ** 0.5)
    assert [evaluation.keeps_start(best) for best in (0.75, 0.81, 0.82, float("nan"))] == [True, True, False, True]
    unknown = Evaluation(Recorder())
    unknown.start = 0.75
    assert [unknown.keeps_start(best) for best in (0.75, 0.7501)] == [True, False], "without a number of rows any gain counts"
    ones = Evaluation(Recorder(), validation_rows=2)
    ones.start = 1.0
    assert ones.keeps_start(1.0)


def test_training_stops_early(tmp_path, encoder):
    class Falling(Recorder):
        def __call__(self, encode):
            return {"suite/score": -super().__call__(encode)["suite/score"]}

    stop = EarlyStopping("val/suite/score", patience=1, mode="max")
    runner = trainer(tmp_path, [Evaluation(Falling()), stop], max_steps=-1, max_epochs=9, enable_checkpointing=False)
    module = fit(runner, encoder)
    assert module.global_step == 4


def test_a_monitor_that_is_not_measured_is_named(tmp_path, encoder):
    best = ModelCheckpoint(tmp_path, monitor="val/suite/other")
    with pytest.raises(InputError, match=r"monitor=val/suite/other is not measured in validation. There are: val/suite/score"):
        fit(trainer(tmp_path, [Evaluation(Recorder()), best]), encoder)


def test_without_evaluators_nothing_is_measured(tmp_path, encoder):
    runner = trainer(tmp_path, [Evaluation()], enable_checkpointing=False)
    module = fit(runner, encoder)
    assert not [name for name in runner.callback_metrics if name.startswith("val/")]
    assert evaluate_stage(runner, module, "test") == {}


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_embeddings_have_the_training_precision(tmp_path, encoder, precision):
    test = Recorder()
    evaluate_stage(trainer(tmp_path, [Evaluation(test=test)], precision=precision), SimCSEUnsup(encoder), "test")
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"), torch.no_grad():
        expected = encoder.eval()(encoder.prepare(TEXTS[:2])).float()
    torch.testing.assert_close(test.seen[0], expected, rtol=0, atol=5e-3)
    assert test.seen[0].dtype == torch.float32
