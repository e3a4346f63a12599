"""A run that was stopped goes on as if it had not been."""

import os
import re
import signal

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from tercet.model.checkpoint import read
from tercet.objective import SimCSEUnsup
from tests.conftest import tiny
from tests.end_to_end.conftest import FAST, write_texts

STREAM = ["data.streaming=true", "data.held_out=4"]


@pytest.fixture
def run(command, tmp_path):
    """``run(*overrides)``: three epochs of a few batches with dropout, a checkpoint every second step."""
    write_texts(tmp_path / "my.txt")
    few = [o for o in FAST if "max_steps" not in o]
    every = ["save_every=2", "measure_before=false", "trainer.max_epochs=3", "logger=none"]
    return lambda *more: command("train", *tiny("data=text", f"data.path={tmp_path / 'my.txt'}", *few, *every, *more))


def weights(output):
    return read(output / "checkpoints" / "last.ckpt")["state_dict"]


@pytest.mark.parametrize(
    ("objective", "stop", "more"),
    [
        ("simcse_unsup", 3, []),
        ("simcse_unsup", 8, []),
        ("simcse_unsup", 15, []),
        ("mlm", 10, []),
        *(("simcse_unsup", stop, STREAM) for stop in (3, 8, 15)),
    ],
)  # 8 batches are an epoch
def test_weights_are_bit_identical(run, monkeypatch, tmp_path, stop, objective, more):
    whole = run(f"objective={objective}", *more)
    assert whole.code == 0, whole.terminal
    expected = weights(whole.output)
    whole.output.rename(tmp_path / "whole")

    original = ModelCheckpoint.on_train_batch_end

    def killed(self, trainer, *args, **kwargs):
        original(self, trainer, *args, **kwargs)
        if trainer.global_step == stop:
            self.save_on_exception = False  # as SIGKILL: nothing more is written
            raise KeyboardInterrupt

    monkeypatch.setattr(ModelCheckpoint, "on_train_batch_end", killed)
    assert run(f"objective={objective}", *more).code == 130
    assert read(whole.output / "checkpoints" / "last.ckpt")["global_step"] == stop // 2 * 2
    monkeypatch.setattr(ModelCheckpoint, "on_train_batch_end", original)
    resumed = run(f"objective={objective}", *more, "resume=true")
    assert resumed.code == 0 and f"step {stop // 2 * 2}" in resumed.terminal, resumed.terminal
    found = weights(resumed.output)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_resume_without_a_checkpoint_is_a_start(run):
    result = run("resume=true")
    assert result.code == 0 and "going on" not in result.terminal


def test_ctrl_c_in_the_middle_of_a_step_changes_nothing(run, monkeypatch, tmp_path):
    whole = run()
    expected = weights(whole.output)
    whole.output.rename(tmp_path / "whole")
    original = SimCSEUnsup.training_step

    def stopped(self, batch, batch_idx):
        value = original(self, batch, batch_idx)
        if self.global_step == 5:
            raise KeyboardInterrupt  # its draws are made, its step is not
        return value

    monkeypatch.setattr(SimCSEUnsup, "training_step", stopped)
    assert run("save_every=null").code == 130
    monkeypatch.setattr(SimCSEUnsup, "training_step", original)
    resumed = run("resume=true")
    assert "going on from" in resumed.terminal and "step 5" in resumed.terminal
    for name, value in expected.items():
        assert torch.equal(weights(resumed.output)[name], value), name


def test_other_settings_are_not_mixed_in(run):
    assert run("trainer.max_epochs=1").code == 0
    result = run("resume=true", "optimizer.lr=0.5")
    assert result.code == 1
    assert re.search(r"was begun with optimizer.lr=0.0001, not 0.5. Set it as it was", result.terminal)


def test_sigterm_saves_the_step_it_was_at(run, monkeypatch):
    original = ModelCheckpoint.on_train_batch_end

    def told(self, trainer, *args, **kwargs):
        original(self, trainer, *args, **kwargs)
        if trainer.global_step == 5 and self.filename == "last":
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(ModelCheckpoint, "on_train_batch_end", told)
    result = run("save_every=null")
    assert result.code == 143, result.terminal  # not 0: a scheduler would take it for finished
    assert read(result.output / "checkpoints" / "last.ckpt")["global_step"] == 5
