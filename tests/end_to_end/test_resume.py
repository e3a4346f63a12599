"""A run that was stopped goes on as if it had not been."""

import os
import re
import signal

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from tercet.model.checkpoint import read
from tercet.objective import SimCSEUnsup
from tests.end_to_end.conftest import weights

STREAM = ["data.streaming=true", "data.held_out=4"]


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


@pytest.mark.parametrize("more", [[], STREAM], ids=["rows", "stream"])
@pytest.mark.parametrize("batch", [4, 7], ids=["", "last"])
def test_a_gradient_that_was_being_added_up_is_made_again(run, monkeypatch, tmp_path, more, batch):
    """Steps of 3, 3 and 2 batches: of the batches 3 to 5 one, and of the last two one, is in no step yet."""
    adds_up = ["trainer.accumulate_grad_batches=3", "save_every=null", *more]
    whole = run(*adds_up)
    assert whole.code == 0, whole.terminal
    expected = weights(whole.output)
    whole.output.rename(tmp_path / "whole")
    original = SimCSEUnsup.training_step

    def stopped(self, rows, batch_idx):
        if self.current_epoch == 1 and batch_idx == batch:
            raise KeyboardInterrupt
        return original(self, rows, batch_idx)

    monkeypatch.setattr(SimCSEUnsup, "training_step", stopped)
    assert run(*adds_up).code == 130
    monkeypatch.setattr(SimCSEUnsup, "training_step", original)
    resumed = run(*adds_up, "resume=true")
    assert f"step {3 + batch // 3}" in resumed.terminal
    for name, value in expected.items():
        assert torch.equal(weights(resumed.output)[name], value), name


@pytest.fixture
def terminal():
    """Ctrl-C counts, also where the tests run in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_lets_the_step_be_made(run, monkeypatch, terminal):
    original = SimCSEUnsup.training_step

    def interrupted(self, batch, batch_idx):
        value = original(self, batch, batch_idx)
        if self.global_step == 5:
            signal.raise_signal(signal.SIGINT)
        return value

    monkeypatch.setattr(SimCSEUnsup, "training_step", interrupted)
    result = run("save_every=null")
    assert result.code == 130, result.terminal
    assert read(result.output / "checkpoints" / "last.ckpt")["global_step"] == 6
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_is_nothing_in_the_background(run, monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    original = SimCSEUnsup.training_step

    def interrupted(self, batch, batch_idx):
        signal.raise_signal(signal.SIGINT)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(SimCSEUnsup, "training_step", interrupted)
    try:
        assert run("trainer.max_epochs=1").code == 0
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_second_ctrl_c_ends_at_once(run, monkeypatch, terminal):
    original = SimCSEUnsup.training_step

    def interrupted(self, batch, batch_idx):
        value = original(self, batch, batch_idx)
        if self.global_step == 5:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return value

    monkeypatch.setattr(SimCSEUnsup, "training_step", interrupted)
    result = run("save_every=null")
    assert result.code == 130
    assert read(result.output / "checkpoints" / "last.ckpt")["global_step"] == 5


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
