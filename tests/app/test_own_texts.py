"""What data=text trains with where the command does not say."""

from types import SimpleNamespace

import pytest

from tercet.app.cli import main
from tercet.app.own_texts import objective_for, selection_for, set_run_length
from tercet.errors import InputError
from tercet.training import FaceNet, Pretraining, QuickThoughts, SimCSESup, SimCSEUnsup
from tests.conftest import composed


def source(*columns, provides=()):
    return SimpleNamespace(columns=columns, provides=frozenset(provides))


@pytest.mark.parametrize(("columns", "provides", "objective"), [
    ("a", (), "simcse_unsup"), ("ab", (), "simcse_sup"), ("abc", (), "simcse_sup"), ("ab", ("label",), "simcse_sup"),
    ("a", ("label",), "facenet"), ("a", ("label", "position"), "quick_thoughts"),
])  # fmt: skip
def test_the_columns_choose_the_objective(columns, provides, objective):
    assert objective_for(source(*columns, provides=provides)) == objective


@pytest.mark.parametrize(("objective", "columns", "selection"), [
    (SimCSEUnsup, 1, "retrieval"), (SimCSESup, 3, "retrieval"), (FaceNet, 1, "nearest_neighbor"), (FaceNet, 2, "retrieval"),
    (QuickThoughts, 1, "none"), (Pretraining, 1, "none"),
])  # fmt: skip
def test_what_is_learned_is_what_selects(objective, columns, selection):
    assert selection_for(objective, columns) == selection


def lengths(*overrides, rows=192):
    cfg = composed("data=text", "data.path=x", "experiment=own_texts", *overrides)
    data = SimpleNamespace(streaming=rows is None, batch_size=32, num_rows=lambda: rows)
    set_run_length(cfg, data)
    trainer = cfg.trainer
    return trainer.max_steps, trainer.max_epochs, trainer.val_check_interval, trainer.check_val_every_n_epoch


def test_steps_and_validations_follow_the_rows(capsys):
    assert lengths() == (60, -1, 6, None)
    assert "60 steps of 32 rows, 10.0 passes over 192 training rows" in capsys.readouterr().err
    assert lengths(rows=100_000) == (1000, -1, 100, None)
    assert lengths(rows=None) == (1000, -1, 100, None)
    assert lengths("run_length.epochs=2", "run_length.validations=3") == (12, -1, 4, None)
    assert lengths("trainer.accumulate_grad_batches=2") == (60, -1, 12, None)


def test_another_component_is_no_length():
    with pytest.raises(InputError, match=r"^run_length: a component is needed, with _target_: tercet.training.RunLength"):
        lengths("run_length={_target_:os.getcwd}", "~run_length.epochs", "~run_length.at_most", "~run_length.validations")


def test_what_the_user_gives_is_obeyed(capsys):
    assert lengths("trainer.max_steps=7") == (7, -1, 1, None)
    assert lengths("trainer.max_epochs=3") == (-1, 3, None, 1), "each epoch is validated"
    assert lengths("trainer.val_check_interval=5")[2:] == (5, 1)
    assert lengths("selection=none") == (60, -1, None, 1), "nothing is validated"
    assert "steps of" in capsys.readouterr().err


@pytest.mark.parametrize(("given", "experiment"), [
    ([], "quickstart"), (["data=text", "data.path=x"], "own_texts"), (["data=text", "data.path=x", "seed=2"], "own_texts"),
    (["data=text", "data.path=x", "experiment=quickstart"], "quickstart"), (["data=text", "data.path=x", "~experiment"], None),
])  # fmt: skip
def test_only_ones_own_texts_have_the_recipe(given, experiment, capsys):
    with pytest.raises(SystemExit):
        main("train", [*given, "--cfg", "job", "--package", "run_length"])
    assert ("RunLength" in capsys.readouterr().out) == (experiment == "own_texts")
