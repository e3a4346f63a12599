"""The rows after a resume are those of a run that went on, wherever it was stopped and however its length is given."""

import contextlib
import itertools

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, IterableDataset

from tercet.training.callbacks import LastCheckpoint, RNGState
from tercet.training.contrastive import ObjectiveHooks
from tercet.training.datamodule import DataModule
from tercet.training.lightning_compat import EvaluationHooks
from tests.conftest import Ids

pytestmark = pytest.mark.filterwarnings("ignore")
BATCHES = 4  # an epoch
LENGTHS = {
    "epochs": {"max_epochs": 3},
    "both": {"max_epochs": 3, "max_steps": 50},
    "steps": {"max_epochs": -1, "max_steps": 12},
    "every other epoch validated": {"max_epochs": 3, "max_steps": 50, "check_val_every_n_epoch": 2},
    "accumulated": {"max_epochs": 3, "max_steps": 50, "accumulate_grad_batches": 3},
}


class Numbers(Ids):
    """Rows whose batches are their numbers."""

    def __getitem__(self, indices):
        return torch.tensor(indices.rows)


class Rows(DataModule):
    """Eight rows, in batches of two."""

    columns, streaming = ("text",), False

    def __init__(self, workers):
        super().__init__(self, self, batch_size=2, workers=workers)

    def load(self, source):
        return Numbers(torch.zeros(2 * BATCHES, dtype=torch.long))


class Stream(Rows):
    """The number of the epoch and of the batch."""

    streaming = True

    def train_dataloader(self):
        start = self._start_of_epoch

        class Batches(IterableDataset):
            def __iter__(self):
                epoch, done = start()
                yield from (torch.tensor([epoch, number]) for number in range(done, BATCHES))

        return DataLoader(Batches(), batch_size=None)


class Module(EvaluationHooks, pl.LightningModule):
    """Remembers its batches, and is killed after one."""

    on_train_start = ObjectiveHooks.on_train_start

    def __init__(self, stop):
        super().__init__()
        self.layer, self.stop, self.seen, self.validated = torch.nn.Linear(1, 1), stop, [], []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.trainer.fit_loop.epoch_loop.total_batch_idx, tuple(batch.tolist())))
        return self.layer(batch.float()[:1]).sum()

    def validation_step(self, batch, batch_idx):
        self.validated.append(self.global_step)

    def on_train_batch_start(self, batch, batch_idx):
        if len(self.seen) == self.stop:
            raise KeyboardInterrupt

    def configure_optimizers(self):
        assert self.trainer.estimated_stepping_batches  # asks for the loader before a checkpoint's progress is restored
        return torch.optim.SGD(self.parameters(), 0.01)


def fit(folder, data, stop, save_every, resume, **length):
    module, last = Module(stop), LastCheckpoint(str(folder), save_every)
    last.save_on_exception = False
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[last, RNGState()],
        use_distributed_sampler=False, default_root_dir=folder, num_sanity_val_steps=0, **length,
    )  # fmt: skip
    try:
        trainer.fit(module, datamodule=data, ckpt_path=str(folder / "last.ckpt") if resume else None)
    except (KeyboardInterrupt, SystemExit):
        assert stop is not None
    return module


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("kind", "workers"), [(Rows, 0), (Rows, 2), (Stream, 0)], ids=["rows", "workers", "stream"])
def test_the_batches_after_a_resume_are_those_that_were_left(tmp_path, kind, workers, length):
    if kind is Stream and length == "epochs":
        pytest.skip("a stream needs a number of steps")
    settings = LENGTHS[length]
    whole = fit(tmp_path, kind(0), None, None, False, **settings)
    assert len(whole.seen) == 3 * BATCHES
    stops = [(5, None), (9, None)] if workers else [*itertools.product((5, 7, 9), (None, 1)), (6, 1)]
    for stop, save_every in stops:
        folder = tmp_path / f"{stop}-{save_every}"
        fit(folder, kind(workers), stop, save_every, False, **settings)
        if not (folder / "last.ckpt").is_file():  # no epoch was validated before, which is when it is written
            continue
        step = torch.load(folder / "last.ckpt", weights_only=True)["global_step"]
        resumed = fit(folder, kind(workers), None, save_every, True, **settings)
        assert resumed.seen == whole.seen[-len(resumed.seen) :], (stop, save_every, step)
        first = len(whole.seen) - len(resumed.seen)
        steps = sum(number % BATCHES in (2, 3) for number in range(first)) if length == "accumulated" else first
        assert steps == step, (stop, save_every)


class Interrupted(pl.Callback):
    """Ctrl-C before the batch of a number, counted from the start, or after as many batches."""

    def __init__(self, where, number):
        self.where, self.number, self.count = where, number, 0

    def on_train_batch_start(self, *_):
        if (self.where, self.count) == ("before", self.number):
            raise KeyboardInterrupt
        self.count += 1

    def on_train_batch_end(self, *_):
        if (self.where, self.count) == ("after", self.number):
            raise KeyboardInterrupt


def go_on(folder, data, *callbacks):
    module = Module(None)
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_epochs=3, max_steps=50,
        callbacks=[LastCheckpoint(str(folder), 2), RNGState(), *callbacks], use_distributed_sampler=False,
        default_root_dir=folder, num_sanity_val_steps=0,
    )  # fmt: skip
    last = folder / "last.ckpt"
    with contextlib.suppress(KeyboardInterrupt, SystemExit):
        trainer.fit(module, datamodule=data, ckpt_path=str(last) if last.is_file() else None)
    return module.seen


@pytest.mark.parametrize(
    ("kind", "workers"),
    [(Rows, 0), pytest.param(Rows, 1, marks=pytest.mark.slow), (Stream, 0)],
    ids=["rows", "workers", "stream"],
)
def test_two_stops_in_a_row_lose_and_repeat_no_batch(tmp_path, kind, workers):
    """Around the ends of epochs, too, and where a batch was begun and not processed."""
    whole = go_on(tmp_path / "whole", kind(0))
    firsts = [("after", 4), ("before", 3), ("before", 4), ("after", 5)]
    for number, (first, second) in enumerate(itertools.product(firsts, [("after", 4), ("before", 0), ("before", 4)])):
        folder = tmp_path / str(number)
        seen = go_on(folder, kind(workers), Interrupted(*first)) + go_on(folder, kind(workers), Interrupted(*second))
        assert seen + go_on(folder, kind(workers)) == whole, (first, second)
