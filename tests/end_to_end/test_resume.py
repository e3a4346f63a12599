"""A run that was stopped goes on as if it had not been."""

import csv
import os
import re
import signal
import time

import pytest
import torch
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import ModelCheckpoint

from tercet.app import run_folder
from tercet.app.commands.train import CHECKPOINT_PARTS, check_resume
from tercet.app.run_files import read_metrics
from tercet.errors import InputError
from tercet.evaluation import Retrieval
from tercet.models.folder import read_checkpoint
from tercet.training import SimCSEUnsup
from tests.app.test_run_folder import end, holder
from tests.end_to_end.conftest import assert_same_weights

SLOW = pytest.mark.slow  # the same at another place
LABELED = ["data.path={folder}/labels.csv", "data.columns=[text]", "data.label=topic", "evaluation@test=none"]
STREAM = ["data.streaming=true", "data.held_out=4", "trainer.max_steps=50"]  # the schedule needs a number of steps


@pytest.mark.parametrize(
    ("objective", "stop", "more"),
    [
        pytest.param("simcse_unsup", 3, [], marks=SLOW),
        ("simcse_unsup", 8, []),
        pytest.param("simcse_unsup", 15, [], marks=SLOW),
        ("mlm", 10, []),
        ("classification", 10, LABELED),
        ("simcse_unsup", 10, ["sampler=no_duplicates"]),
        ("simcse_unsup", 10, ["data.workers=2", "view=mixed"]),  # workers make the views, from the number of the step
        pytest.param("simcse_unsup", 3, STREAM, marks=SLOW),
        ("simcse_unsup", 8, STREAM),
        pytest.param("simcse_unsup", 15, STREAM, marks=SLOW),
    ],
)  # 8 batches are an epoch
def test_weights_are_bit_identical(run, whole, monkeypatch, stop, objective, more):
    before = whole(f"objective={objective}", *more)

    original = ModelCheckpoint.on_train_batch_end

    def killed(self, trainer, *args, **kwargs):
        original(self, trainer, *args, **kwargs)
        if trainer.global_step == stop:
            self.save_on_exception = False  # as SIGKILL: nothing more is written
            raise KeyboardInterrupt

    monkeypatch.setattr(ModelCheckpoint, "on_train_batch_end", killed)
    ended = run(f"objective={objective}", *more)
    assert ended.code == 130
    assert read_checkpoint(ended.output / "checkpoints" / "last.ckpt")["global_step"] == stop // 2 * 2
    monkeypatch.setattr(ModelCheckpoint, "on_train_batch_end", original)
    resumed = run(f"objective={objective}", *more, "resume=true")
    assert resumed.code == 0 and f"step {stop // 2 * 2}" in resumed.terminal, resumed.terminal
    assert_same_weights(resumed.output, before)


@pytest.fixture
def killed(run, monkeypatch):
    """``killed(*overrides)``: a run that is killed in its first step: it leaves its settings and nothing else."""

    def stopped(*_):
        raise KeyboardInterrupt

    def made(*more):
        with monkeypatch.context() as patched:
            patched.setattr(SimCSEUnsup, "training_step", stopped)
            patched.setattr(ModelCheckpoint, "on_exception", lambda *_: None)
            result = run(*more)
        assert result.code == 130, result.terminal
        return result

    return made


def test_a_folder_used_again_holds_one_run_and_the_other_aside(run, killed, command, tmp_path):
    """Seed 1 finished; seed 2 begun in the same folder, killed before its first checkpoint, resumed."""
    once = ["trainer.max_epochs=1", "evaluation@test=heldout"]
    first = run(*once)
    assert first.code == 0, first.terminal
    numbers, folder = first.metrics(), first.output
    assert "before-1/" in killed(*once, "seed=2").terminal
    assert [p.name for p in folder.iterdir() if p.name in ("metrics.json", "model", "checkpoints")] == []
    assert read_metrics(folder / "before-1") == numbers and (folder / "before-1" / "model").is_dir()
    credited = command("compare", str(tmp_path), f"output={tmp_path}")
    assert credited.code == 1 and "no finished run" in credited.terminal, credited.terminal
    resumed = run(*once, "seed=2", "resume=true")
    assert resumed.code == 0 and "is finished" not in resumed.terminal, resumed.terminal
    assert "before-2" not in resumed.terminal, "it is the same run that begins again"
    whole = resumed.output.rename(tmp_path / "resumed")
    assert run(*once, "seed=2").code == 0
    assert_same_weights(whole, folder)
    assert read_metrics(whole) != numbers


def test_a_run_that_goes_on_with_more_steps_has_no_results_until_it_has_made_them(run, killed, command, tmp_path):
    assert run("trainer.max_epochs=1").code == 0
    longer = killed("trainer.max_epochs=2", "resume=true")
    assert "resuming from" in longer.terminal
    credited = command("compare", str(longer.output))
    assert credited.code == 1 and "1 runs have not finished" in credited.terminal, credited.terminal
    done = run("trainer.max_epochs=2", "resume=true")
    assert done.code == 0 and "resuming from" in done.terminal, done.terminal
    assert "is finished" in run("trainer.max_epochs=2", "resume=true").terminal


def test_a_checkpoint_goes_on_with_its_own_settings(run, killed):
    """Not with those in config.yaml, which versions before wrote over."""
    result = run("trainer.max_epochs=1")
    settings = result.output / "config.yaml"
    settings.write_text(settings.read_text().replace("\nseed: 1\n", "\nseed: 2\n"))
    other = run("trainer.max_epochs=2", "seed=2", "resume=true")
    assert other.code == 1 and "was started with seed=1, not 2" in other.terminal, other.terminal
    inside = run(f"init_from={result.output}")
    assert inside.code == 1 and "which is set aside. Use another output_dir" in inside.terminal


def test_a_second_run_in_a_folder_is_refused(run, monkeypatch, tmp_path):
    monkeypatch.setattr(run_folder, "WAIT_SECONDS", 0.5)
    (tmp_path / "run").mkdir()
    child = holder(tmp_path / "run")
    try:
        result = run()
    finally:
        end(child)
    assert result.code == 1 and f"error: output_dir={result.output} is in use by process {child} on " in result.terminal
    assert not (result.output / "config.yaml").exists()


def test_resume_without_a_checkpoint_is_a_start(run):
    result = run("resume=true")
    assert result.code == 0 and "resuming" not in result.terminal


def test_resume_in_a_folder_of_runs_begins_none(run, tmp_path):
    """The folder of one of them was meant; before-1 is what a run has set aside, and leaves room for a new start."""
    (tmp_path / "run" / "mine-1").mkdir(parents=True)
    settings = tmp_path / "run" / "mine-1" / "config.yaml"
    settings.write_text("seed: 1\n")
    result = run("resume=true")
    assert result.code == 1 and f"it holds the run {settings.parent}. Give output_dir=" in result.terminal, result.terminal
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine-1"]
    settings.parent.rename(tmp_path / "run" / "before-1")
    assert run("resume=true").code == 0


def test_ctrl_c_in_the_middle_of_a_step_changes_nothing(run, whole, monkeypatch):
    before = whole()
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
    assert "resuming from" in resumed.terminal and "step 5" in resumed.terminal
    assert_same_weights(resumed.output, before)


@pytest.mark.parametrize("more", [[], pytest.param(STREAM, marks=SLOW)], ids=["rows", "stream"])
@pytest.mark.parametrize("batch", [4, 7], ids=["", "last"])
def test_a_gradient_that_was_being_added_up_is_made_again(run, whole, monkeypatch, more, batch):
    """Steps of 3, 3 and 2 batches: of the batches 3 to 5 one, and of the last two one, is in no step yet."""
    adds_up = ["trainer.accumulate_grad_batches=3", "save_every=null", *more]
    before = whole(*adds_up)
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
    assert_same_weights(resumed.output, before)


@pytest.fixture
def terminal():
    """Ctrl-C counts, also where the tests run in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_lets_the_step_be_made(run, whole, monkeypatch, terminal):
    """And the validation that follows it: the run that goes on has all that the whole one has."""
    validated = ["save_every=null", "evaluation@validation=heldout", "trainer.val_check_interval=2", "logger=csv"]
    before = whole(*validated)
    original = SimCSEUnsup.training_step

    def interrupted(self, batch, batch_idx):
        value = original(self, batch, batch_idx)
        if self.global_step == 5:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)  # `timeout` sends it to the process and to its group
        return value

    monkeypatch.setattr(SimCSEUnsup, "training_step", interrupted)
    result = run(*validated)
    assert result.code == 130, result.terminal
    assert read_checkpoint(result.output / "checkpoints" / "last.ckpt")["global_step"] == 6
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.setattr(SimCSEUnsup, "training_step", original)
    assert run(*validated, "resume=true").code == 0
    assert_same_weights(result.output, before)
    assert validations(result.output) == validations(before)


@pytest.mark.parametrize(
    ("number", "killed"),
    [(2, True), pytest.param(2, False, marks=SLOW), pytest.param(4, True, marks=SLOW), (4, False)],
    ids=["in an epoch, SIGKILL", "Ctrl-C", "at its end, SIGKILL", "Ctrl-C"],
)
def test_a_validation_that_was_cut_off_is_made(run, whole, monkeypatch, number, killed):
    """Also where the checkpoint is of the step before it: the best one is chosen among all."""
    validated = ["evaluation@validation=heldout", "trainer.val_check_interval=2", "logger=csv",
                 "monitor=val/alignment_uniformity/text/uniformity", "optimized_metric=null",
                 "trainer.max_steps=-1"]  # fmt: skip
    before = whole(*validated)
    original, made = SimCSEUnsup.validation_step, []

    def cut(self, evaluator, batch_idx):
        if batch_idx == 0:
            made.append(1)
        if len(made) == number and batch_idx == 0:
            self.trainer.checkpoint_callbacks[1].save_on_exception = not killed
            raise KeyboardInterrupt
        return original(self, evaluator, batch_idx)

    monkeypatch.setattr(SimCSEUnsup, "validation_step", cut)
    assert run(*validated).code == 130
    monkeypatch.setattr(SimCSEUnsup, "validation_step", original)
    resumed = run(*validated, "resume=true")
    assert resumed.code == 0, resumed.terminal
    assert validations(resumed.output) == validations(before)
    best = [read_checkpoint(folder / "checkpoints" / "best.ckpt")["global_step"] for folder in (resumed.output, before)]
    assert best[0] == best[1]


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


def validations(output):
    """What each has measured."""
    with (output / "metrics.csv").open(newline="") as file:
        return [value for row in csv.DictReader(file) if (value := row["val/alignment_uniformity/text/alignment"])]


def test_a_second_ctrl_c_ends_at_once(run, monkeypatch, terminal):
    original = SimCSEUnsup.training_step

    def interrupted(self, batch, batch_idx):
        value = original(self, batch, batch_idx)
        if self.global_step == 5:
            signal.raise_signal(signal.SIGINT)
            time.sleep(1.1)
            signal.raise_signal(signal.SIGINT)
        return value

    monkeypatch.setattr(SimCSEUnsup, "training_step", interrupted)
    result = run("save_every=null")
    assert result.code == 130
    assert read_checkpoint(result.output / "checkpoints" / "last.ckpt")["global_step"] == 5


def test_other_settings_are_not_mixed_in(run):
    assert run("trainer.max_epochs=1").code == 0
    result = run("resume=true", "optimizer.lr=0.5")
    assert result.code == 1
    assert re.search(r"was started with optimizer.lr=5e-05, not 0.5. Set it as it was", result.terminal)


def test_a_checkpoint_that_lacks_a_part_is_refused(run):
    """Lightning goes on without some of them, on other rows."""
    file = run("trainer.max_epochs=1").output / "checkpoints" / "last.ckpt"
    whole = torch.load(file, weights_only=True)
    for older in file.parent.glob("last-*.ckpt"):
        older.unlink()
    for part in CHECKPOINT_PARTS:
        torch.save({key: value for key, value in whole.items() if key != part}, file)
        with pytest.raises(InputError, match=f"last.ckpt lacks {part}, which a run needs to go on"):
            check_resume(OmegaConf.create({"resume": True, "allow_changed_data": False}), file.parents[1])
    torch.save({**whole, "global_step": "3"}, file)
    assert "its global_step is '3', no whole number" in run("trainer.max_epochs=2", "resume=true").terminal


def test_sigterm_ends_an_evaluation_at_once(run, monkeypatch):
    reached = []

    def told(self, encode):
        reached.append("evaluator")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        reached.append("its end")

    monkeypatch.setattr(Retrieval, "__call__", told)
    result = run("evaluation@test=heldout", "measure_before=true")
    assert (result.code, reached) == (143, ["evaluator"]), result.terminal
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_sigterm_saves_the_step_it_was_at(run, monkeypatch):
    original = ModelCheckpoint.on_train_batch_end

    def told(self, trainer, *args, **kwargs):
        original(self, trainer, *args, **kwargs)
        if trainer.global_step == 4 and self.filename == "last":  # between two steps: the next one is completed
            signal.raise_signal(signal.SIGTERM)  # os.kill may choose another thread, and this one makes further steps

    monkeypatch.setattr(ModelCheckpoint, "on_train_batch_end", told)
    result = run("save_every=null")
    assert result.code == 143, result.terminal  # not 0: a scheduler would take it for finished
    assert read_checkpoint(result.output / "checkpoints" / "last.ckpt")["global_step"] == 5
