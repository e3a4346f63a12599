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
from tests.laws.device_operations import do_as_on_a_gpu


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


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "adagrad"])
def test_on_a_gpu_the_optimizer_skips_and_the_host_counts_when_it_logs(optimizer, run, broken, monkeypatch):
    """A step is neither read nor taken; its rows are written, and the run ends, when values are."""
    do_as_on_a_gpu(monkeypatch)
    broken(3, 3)
    result = run("trainer.log_every_n_steps=4", f"optimizer={optimizer}")
    assert result.code == 0, result.terminal
    ((step, _, rows),) = csv.reader((result.output / "skipped.csv").open())
    assert step == "3" and len(rows.split()) == 4 and result.metrics()["train/skipped"] == 1
    last = read_checkpoint(result.output / "checkpoints" / "last.ckpt")["state_dict"]
    assert all(torch.isfinite(value).all() for value in last.values() if value.is_floating_point())


def test_on_a_gpu_many_in_a_row_end_the_run_when_it_logs(run, broken, monkeypatch):
    do_as_on_a_gpu(monkeypatch)
    broken(1, 99)
    result = run("callback.skip_non_finite.patience=3", "trainer.log_every_n_steps=6", "save_every=100")
    assert result.code == 1 and "3 steps in a row up to step 3" in result.terminal, result.terminal


def test_patience_is_checked():
    with pytest.raises(InputError, match="patience=0"):
        SkipNonFinite(0)
