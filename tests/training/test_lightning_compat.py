"""Canaries: what training uses of private interfaces of Lightning and torch is still there and means the same."""

import inspect
import signal
from contextlib import suppress
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from lightning_fabric.loggers import csv_logs
from pytorch_lightning.loops import evaluation_loop, fit_loop, training_epoch_loop
from pytorch_lightning.strategies import ModelParallelStrategy, StrategyRegistry
from torch.utils.data import DataLoader

from tercet.training import lightning_compat as compat
from tercet.training.optimizers import adamw


class Module(compat.EvaluationHooks, pl.LightningModule):
    """Learns one number; fails in the ``stop``-th step or validation."""

    def __init__(self, stop_step=None, stop_validation=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.stop_step, self.stop_validation, self.validations = stop_step, stop_validation, 0

    def training_step(self, batch, batch_idx):
        if self.global_step == self.stop_step:
            raise KeyError
        return self.weight.sum() * batch.sum()

    def validation_step(self, batch, batch_idx):
        self.validations += 1
        if self.validations == self.stop_validation:
            raise KeyError

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Restart(pl.Callback):
    """As ``LastCheckpoint`` does."""

    def on_train_start(self, trainer, pl_module):
        compat.restart_validation(trainer)


def fit(module, checkpoint=None, callbacks=(), **settings):
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, callbacks=list(callbacks), **{"max_epochs": 1, "val_check_interval": 2, **settings},
    )  # fmt: skip
    with suppress(KeyError):
        trainer.fit(module, DataLoader(torch.ones(6, 1)), ckpt_path=checkpoint, weights_only=False if checkpoint else None)
    return trainer


@pytest.mark.filterwarnings("ignore")
def test_an_interrupted_validation_is_run_again(tmp_path):
    first = fit(Module(stop_validation=2))
    progress = first.fit_loop.epoch_loop.val_loop.batch_progress.current
    assert (progress.ready, progress.completed) == (1, 0), "Lightning counts the batches of a validation in another way"
    first.save_checkpoint(tmp_path / "x.ckpt")
    resumed = Module()
    fit(resumed, tmp_path / "x.ckpt", [Restart()])
    assert (resumed.validations, resumed.global_step) == (2, 6), "the one at step 4 again, and that at 6"


@pytest.mark.filterwarnings("ignore")
def test_a_validation_after_the_checkpoint_is_run(tmp_path):
    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / "x.ckpt")

    fit(Module(), callbacks=[Save()])
    resumed = Module()
    fit(resumed, tmp_path / "x.ckpt", [Restart()])
    assert resumed.validations == 3, "the validation due at step 2, and those at 4 and 6"


def test_the_batch_progress_counts_and_is_saved_where_it_was():
    module = Module(stop_step=3)
    trainer = fit(module)
    assert compat.progress_of_epoch(trainer) == (3, 3, 1) and compat.progress_of_epoch(None) == (0, 0, 1)
    checkpoint = {"loops": {"fit_loop": trainer.fit_loop.state_dict()}}
    compat.forget_pending_batches(checkpoint, 1)
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    assert progress["current"] == progress["total"] == {"ready": 2, "started": 2, "processed": 2, "completed": 2}


def test_loops_have_the_attributes_that_are_set():
    assert "self._restart_stage" in inspect.getsource(evaluation_loop._EvaluationLoop.__init__)
    assert hasattr(evaluation_loop.RestartStage, "RESTARTED_MID_EVALUATION")
    assert isinstance(training_epoch_loop._TrainingEpochLoop.restarted_on_train_batch_end, property)
    assert "on_train_start" in inspect.getsource(fit_loop._FitLoop.on_run_start), "the restart stage is known by then"


def test_the_strategy_takes_the_size_of_its_mesh():
    source = inspect.getsource(ModelParallelStrategy.setup_environment)
    assert "self._data_parallel_size" in source, "FSDP2Strategy sets it"
    assert compat.FSDP2 in StrategyRegistry


def test_the_sampler_that_lightning_would_inject_is_known():
    assert not compat.injects_distributed_sampler(pl.Trainer(accelerator="cpu", logger=False))
    two = pl.Trainer(accelerator="cpu", logger=False, devices=2, strategy="ddp")
    assert compat.injects_distributed_sampler(two)
    assert not compat.injects_distributed_sampler(
        pl.Trainer(accelerator="cpu", logger=False, devices=2, strategy="ddp", use_distributed_sampler=False)
    )


def test_fused_adamw_leaves_the_loss_scale_to_the_scaler():
    assert torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], fused=True)._step_supports_amp_scaling
    assert adamw(torch.nn.Linear(2, 2))._step_supports_amp_scaling is False


def test_the_dummy_loader_draws_nothing_from_torchs_generator():
    before = torch.get_rng_state()
    assert list(Module().val_dataloader()) == list(Module().test_dataloader()) == [0]
    assert torch.equal(torch.get_rng_state(), before)


def test_the_csv_writer_has_what_the_atomic_logger_sets(tmp_path):
    writer = csv_logs._ExperimentWriter(str(tmp_path))
    assert (writer.metrics, writer.metrics_keys) == ([], []), "rows that are not saved, and the columns"
    assert writer.metrics_file_path == str(tmp_path / "metrics.csv")


@pytest.mark.filterwarnings("ignore")
def test_a_trainer_leaves_signals_alone_and_puts_back_the_handlers_of_its_start():
    def handler(number, frame):
        pass

    class Look(pl.Callback):
        def setup(self, trainer, pl_module, stage):
            compat.keep_signal_handlers(trainer)

        def on_train_start(self, trainer, pl_module):
            seen.append(signal.getsignal(signal.SIGTERM))
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    seen, before = [], signal.signal(signal.SIGTERM, handler)
    try:
        fit(Module(), callbacks=[Look()])
        assert [*seen, signal.getsignal(signal.SIGTERM)] == [handler, handler]
    finally:
        signal.signal(signal.SIGTERM, before)


class Logging(pl.Callback):
    """What ``logs_now`` says before and after each step, and what Lightning does."""

    def __init__(self):
        self.said, self.written = [], []

    def on_train_batch_start(self, trainer, *_):
        self.said.append(compat.logs_now(trainer))

    def on_train_batch_end(self, trainer, *_):
        assert compat.logs_now(trainer) == self.said[-1]
        self.written.append(trainer._logger_connector.should_update_logs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("accumulate", "every", "expected"), [(1, 4, {0, 3, 5}), (2, 2, {0, 1, 2, 3, 5})])
def test_values_are_computed_in_the_steps_whose_values_are_written(accumulate, every, expected):
    """Of six batches: those of the first step, of every n-th, and the last one."""
    logging = Logging()
    fit(Module(), callbacks=[logging], log_every_n_steps=every, accumulate_grad_batches=accumulate, val_check_interval=None)
    said, written = ({i for i, x in enumerate(found) if x} for found in (logging.said, logging.written))
    assert said == expected and written <= said and len(logging.said) == 6
    assert compat.logs_now(None), "outside a fit"


OPTIMIZERS = {
    "AdamW": partial(torch.optim.AdamW, fused=True),
    "Adam": partial(torch.optim.Adam, fused=True),
    "SGD": partial(torch.optim.SGD, momentum=0.9, weight_decay=0.1, fused=True),
    "SGD, fused, without momentum": partial(torch.optim.SGD, weight_decay=0.1, fused=True),
    "SGD without momentum": torch.optim.SGD,
    "AdaGrad": torch.optim.Adagrad,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_step_is_taken_that_is_to_be_skipped(name):
    """Also the first, and with a gradient that is not finite."""
    weight, twice = stepped(name, (True, False, True, False)), stepped(name, (False, False))
    assert torch.equal(weight[0], torch.ones(3)) and torch.equal(weight[1], weight[2])
    torch.testing.assert_close(weight[3], twice[1], msg="the state counts the steps that were taken")


def stepped(name, skips):
    """The weights after each step."""
    weight, seen = torch.nn.Parameter(torch.ones(3)), []
    optimizer = OPTIMIZERS[name]([weight], lr=0.1)
    if optimizer.defaults.get("momentum"):
        optimizer.state[weight]["momentum_buffer"] = torch.zeros(3)
    for skip in skips:
        weight.grad = torch.full((3,), torch.nan if skip else 1.0)
        assert compat.skip_on_device(optimizer, torch.tensor(skip))
        optimizer.step()
        seen.append(weight.detach().clone())
    return seen


@pytest.mark.parametrize(
    "make",
    [
        partial(torch.optim.SGD, momentum=0.9, fused=True), partial(torch.optim.SGD, momentum=0.9), torch.optim.AdamW,
        partial(torch.optim.Adagrad, weight_decay=0.1), torch.optim.RMSprop,
    ],
)  # fmt: skip
def test_others_cannot_skip_by_themselves(make):
    """Fused SGD cannot, either, before it has its momentum."""
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.full((3,), torch.nan)
    assert not compat.skip_on_device(make([weight], lr=0.1), torch.tensor(True))
    assert weight.grad.isnan().all()
