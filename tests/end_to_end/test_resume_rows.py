"""A run that goes on has the rows, the learning rates and the data of one that was not stopped."""

import re
from pathlib import Path

import pytest
from pytorch_lightning.callbacks import ModelCheckpoint

from tercet.models.folder import read_checkpoint
from tercet.training import SimCSEUnsup
from tests.end_to_end.conftest import assert_same_weights

SLOW = pytest.mark.slow  # the same of other batches
STREAM = ["data.streaming=true", "data.held_out=8", "trainer.max_steps=50"]
DOCUMENTS = [
    "data.path={folder}/books.csv",
    "data.columns=[text]",
    "data.label=book",
    "data.position=place",
    "sampler.window=4",
]
KINDS = {
    "rows": ["objective=simcse_unsup"],
    "labels": ["objective=facenet", "data.path={folder}/labels.csv", "data.columns=[text]", "data.label=topic",
               "sampler.per_label=2", "callback=hard_labels", "evaluation@test=none"],
    "windows": ["objective=quick_thoughts", *DOCUMENTS, "evaluation@test=none"],
}  # fmt: skip


@pytest.fixture
def kill(run, monkeypatch):
    """``kill(step, *overrides)``: a run that ends after this step as by SIGKILL: nothing more is written."""

    def killed(step, *more):
        original = ModelCheckpoint.on_train_batch_end

        def end(self, trainer, *args, **kwargs):
            original(self, trainer, *args, **kwargs)
            if trainer.global_step == step:
                self.save_on_exception = False
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(ModelCheckpoint, "on_train_batch_end", end)
            ended = run(*more)
        assert ended.code == 130, ended.terminal
        return ended

    return killed


@pytest.fixture(autouse=True)
def books(tmp_path):
    """Forty sentences of ten documents, of which some are held out."""
    rows = [f"sentence {i} of book {i // 4} is about {i % 7} things,{i // 4},{i % 4}" for i in range(40)]
    (tmp_path / "books.csv").write_text("\n".join(["text,book,place", *rows]) + "\n")


@pytest.mark.parametrize(
    ("kind", "stop"),
    [("rows", 13), ("labels", 8), pytest.param("rows", 16, marks=SLOW), pytest.param("windows", 13, marks=SLOW)],
)  # 8 batches are an epoch
def test_workers_fetch_the_rows_of_the_epoch(run, whole, kill, kind, stop):
    """Killed with two workers and resumed with one; the whole run has none."""
    before = whole(*KINDS[kind])
    kill(stop, *KINDS[kind], "data.workers=2")
    resumed = run(*KINDS[kind], "data.workers=1", "resume=true")
    assert resumed.code == 0 and f"step {stop // 2 * 2}" in resumed.terminal, resumed.terminal
    assert_same_weights(resumed.output, before)


@pytest.mark.parametrize("more", [[], STREAM], ids=["rows", "stream"])
def test_a_checkpoint_of_the_end_of_an_epoch_is_followed_by_the_next(run, whole, kill, more):
    settings = [*more, "save_every=null"]
    before = whole(*settings)
    killed = kill(11, *settings)
    assert read_checkpoint(killed.output / "checkpoints" / "last.ckpt")["global_step"] == 8
    resumed = run(*settings, "resume=true")
    assert resumed.code == 0, resumed.terminal
    assert_same_weights(resumed.output, before)


def test_more_steps_have_the_learning_rates_of_the_longer_schedule(run, monkeypatch):
    rates, original = {}, SimCSEUnsup.training_step

    def recorded(self, batch, batch_idx):
        rates[self.global_step] = self.trainer.optimizers[0].param_groups[0]["lr"]
        return original(self, batch, batch_idx)

    monkeypatch.setattr(SimCSEUnsup, "training_step", recorded)
    settings = ["trainer.max_epochs=-1", "optimizer.lr=0.1", "scheduler.warmup=0"]
    assert run("trainer.max_steps=4", *settings).code == 0
    resumed = run("trainer.max_steps=8", *settings, "resume=true")
    assert resumed.code == 0 and "step 4" in resumed.terminal, resumed.terminal
    expected = [0.1 * (1 - step / total) for step, total in [*((i, 4) for i in range(4)), *((i, 8) for i in range(4, 8))]]
    assert [rates[step] for step in range(8)] == pytest.approx(expected)


def test_changed_data_is_refused_and_named(run, kill, tmp_path):
    """The same rows at another place, in another cache, are no change."""
    killed = kill(5)
    found = read_checkpoint(killed.output / "checkpoints" / "last.ckpt")["global_step"]
    file = tmp_path / "my.txt"
    moved = file.rename(tmp_path / "moved.txt")
    assert run(f"data.path={moved}", f"data.cache={tmp_path}/other", "trainer.max_steps=6", "resume=true").code == 0
    moved.write_text(moved.read_text().replace("Dogs run.", "Dogs walk."))
    refused = run(f"data.path={moved}", "trainer.max_steps=8", "resume=true")
    assert refused.code == 1
    assert re.search(r"was started with data.fingerprint=[0-9a-f]+-[0-9a-f]+, not [0-9a-f]+-[0-9a-f]+\.", refused.terminal)
    assert "set allow_changed_data=true to go on" in refused.terminal
    allowed = run(f"data.path={moved}", "trainer.max_steps=8", "resume=true", "allow_changed_data=true")
    assert allowed.code == 0 and "resuming from" in allowed.terminal, allowed.terminal
    assert found == 4 and Path(allowed.output).is_dir()


def test_what_a_step_learns_by_is_not_changed(run, kill):
    kill(5)
    refused = run("trainer.accumulate_grad_batches=2", "resume=true")
    assert refused.code == 1
    assert "was started with trainer.accumulate_grad_batches=1, not 2. Set it as it was" in refused.terminal
