"""SLURM's warning that it takes the machine away, in a job of SLURM's that is made up."""

import os
import signal

import pytest

from tercet.training import SimCSEUnsup
from tercet.training.datamodule import DataModule
from tests.end_to_end.conftest import assert_same_weights

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


def test_slurms_warning_saves_queues_again_and_the_job_goes_on(run, whole, monkeypatch, slurm):
    before = whole()
    with monkeypatch.context() as patch:
        warned(patch, 4)
        result = run("save_every=null")
    assert result.code == 143 and "queues job 42 again" in result.terminal, result.terminal
    assert slurm.read_text().split() == ["requeue", "42", "last.ckpt"], "saved first, then asked"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    again = run("save_every=null")  # the same command
    assert again.code == 0 and "step 5" in again.terminal, again.terminal
    assert_same_weights(again.output, before)
    assert len(slurm.read_text().split()) == 3, "a run that ends is not queued again"


def test_of_a_jobs_array_the_task_is_queued_again_and_a_refusal_is_said(run, monkeypatch, slurm):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "40")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    (slurm.parent / "bin" / "scontrol").write_text('#!/bin/sh\necho "no such job: $2" >&2\nexit 1\n')
    warned(monkeypatch, 1)
    result = run()
    assert result.code == 143
    assert "scontrol requeue 40_2: no such job: 40_2. The same command with resume=true continues the run." in result.terminal


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
