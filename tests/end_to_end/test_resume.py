"""A run that was stopped goes on as if it had not been."""

import os
import re
import signal

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from tercet.data import DataModule
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


def test_ctrl_c_lets_the_step_be_made(run, monkeypatch):
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


def test_a_second_ctrl_c_ends_at_once(run, monkeypatch):
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


SLURM = {"SLURM_JOB_ID": "42", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "1"}


@pytest.fixture
def slurm(monkeypatch, tmp_path):
    """``scontrol`` on the path, which writes down what it was asked, and a job of SLURM's around."""
    asked = tmp_path / "asked.txt"
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {asked}\nls {tmp_path}/run/checkpoints >> {asked}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    return asked


def warned(monkeypatch, step):
    """SLURM's warning, in the middle of a step."""
    original = SimCSEUnsup.training_step

    def told(self, batch, batch_idx):
        if self.global_step == step:
            signal.raise_signal(signal.SIGUSR1)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(SimCSEUnsup, "training_step", told)


def test_slurms_warning_saves_queues_again_and_the_job_goes_on(run, monkeypatch, slurm, tmp_path):
    whole = run()
    expected = weights(whole.output)
    whole.output.rename(tmp_path / "whole")
    with monkeypatch.context() as patch:
        warned(patch, 4)
        result = run("save_every=null")
    assert result.code == 143 and "queue job 42 again" in result.terminal, result.terminal
    assert slurm.read_text().split() == ["requeue", "42", "last.ckpt"], "saved first, then asked"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    again = run("save_every=null")  # the same command
    assert again.code == 0 and "step 5" in again.terminal, again.terminal
    for name, value in expected.items():
        assert torch.equal(weights(again.output)[name], value), name
    assert len(slurm.read_text().split()) == 3, "a run that ends is not queued again"


def test_of_a_jobs_array_the_task_is_queued_again_and_a_refusal_is_said(run, monkeypatch, slurm):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "40")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    (slurm.parent / "bin" / "scontrol").write_text('#!/bin/sh\necho "no such job: $2" >&2\nexit 1\n')
    warned(monkeypatch, 1)
    result = run()
    assert result.code == 143
    assert "scontrol requeue 40_2: no such job: 40_2. The same command with resume=true goes on." in result.terminal


def test_a_warning_while_nothing_trains_queues_again(run, monkeypatch, slurm):
    monkeypatch.setattr(DataModule, "prepare_data", lambda self: signal.raise_signal(signal.SIGUSR1))
    assert run().code == 143
    assert slurm.read_text().split()[:2] == ["requeue", "42"]


def test_sigusr1_is_nobodys_business_outside_slurm(run, monkeypatch):
    before = signal.getsignal(signal.SIGUSR1)
    seen = []
    original = SimCSEUnsup.training_step

    def look(self, batch, batch_idx):
        seen.append(signal.getsignal(signal.SIGUSR1))
        return original(self, batch, batch_idx)

    monkeypatch.setattr(SimCSEUnsup, "training_step", look)
    assert run("trainer.max_epochs=1").code == 0
    assert set(seen) == {before}
