"""A gradient that is no number: its step is skipped, its rows are named, and too many in a row end the run."""

import csv

import pytest
import torch

from tercet.errors import InputError
from tercet.models.folder import read_checkpoint
from tercet.training import SimCSEUnsup
from tercet.training.callbacks import SkipNonFinite
from tests.conftest import tiny
from tests.end_to_end.conftest import FAST, write_texts


@pytest.fixture
def run(command, tmp_path):
    write_texts(tmp_path / "my.txt")
    few = [o for o in FAST if "max_steps" not in o]
    return lambda *more: command("train", *tiny(
        "data=text", f"data.path={tmp_path / 'my.txt'}", *few, "measure_before=false", "objective=simcse_unsup",
        "trainer.max_steps=8", "save_every=1", *more))  # fmt: skip


@pytest.fixture
def broken(monkeypatch):
    """``broken(first, last)``: the loss of these steps is no number."""

    def at(first, last):
        original = SimCSEUnsup.training_step

        def step(self, batch, batch_idx):
            value = original(self, batch, batch_idx)
            return value * float("nan") if first <= self.global_step <= last else value

        monkeypatch.setattr(SimCSEUnsup, "training_step", step)

    return at


def test_one_step_is_skipped_and_its_rows_are_named(run, broken, caplog):
    broken(3, 3)
    result = run()
    assert result.code == 0, result.terminal
    assert caplog.text.count("step 3: the gradient is not finite") == 1
    ((step, process, rows),) = csv.reader((result.output / "skipped.csv").open())
    assert (step, process) == ("3", "0") and len(rows.split()) == 4
    state = read_checkpoint(result.output / "checkpoints" / "last.ckpt")
    assert all(torch.isfinite(value).all() for value in state["state_dict"].values() if value.is_floating_point())
    assert result.metrics()["train/skipped"] == 1
    before = read_checkpoint(result.output / "checkpoints" / "last-1.ckpt")
    assert (before["global_step"], state["global_step"]) == (7, 8), "the checkpoint before it stays"


def test_the_skipped_step_changes_no_weight(run, broken):
    broken(7, 7)
    output = run().output / "checkpoints"
    last, before = (read_checkpoint(output / name)["state_dict"] for name in ("last.ckpt", "last-1.ckpt"))
    assert all(torch.equal(value, before[name]) for name, value in last.items())


def test_many_in_a_row_end_the_run_with_good_weights(run, broken):
    broken(2, 99)
    result = run("callback.skip_non_finite.patience=3")
    assert result.code == 1 and "3 steps in a row up to step 4" in result.terminal, result.terminal
    assert len((result.output / "skipped.csv").read_text().splitlines()) == 3
    state = read_checkpoint(result.output / "checkpoints" / "last.ckpt")["state_dict"]
    assert all(torch.isfinite(value).all() for value in state.values() if value.is_floating_point())


def test_patience_is_checked():
    with pytest.raises(InputError, match="patience=0"):
        SkipNonFinite(0)
