"""What a run says of its dropout is what it uses, on the device it trains on."""

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch.utils.data import DataLoader

from tercet.models import TextEncoder
from tercet.training import SimCSEUnsup
from tercet.training import contrastive as module_of_the_step
from tests.training.callbacks.test_evaluation import batch

SAID = {"cpu": "rows are packed, dropout is by (seed, step, row)", "cuda": "rows are packed, dropout is torch's"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("device", SAID)
def test_a_run_says_which_dropout_it_uses_where_it_trains(device, encoder, tmp_path, monkeypatch, capsys):
    """The device is the model's own, the CPU, until Lightning moves the model to the trainer's."""
    place, seeded = {"type": "cpu"}, []
    monkeypatch.setattr(TextEncoder, "device", property(lambda self: torch.device(place["type"])))
    monkeypatch.setattr(SingleDeviceStrategy, "model_to_device", lambda self: place.update(type=device))
    real = module_of_the_step.with_dropout_seeds
    monkeypatch.setattr(module_of_the_step, "with_dropout_seeds", lambda *args: seeded.append(1) or real(*args))
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(accelerator="cpu", max_steps=1, default_root_dir=tmp_path, **options)
    trainer.fit(SimCSEUnsup(encoder), DataLoader([batch(encoder)], batch_size=None))
    assert [line for line in capsys.readouterr().err.splitlines() if "dropout is" in line] == [SAID[device]]
    assert seeded == ([1] if device == "cpu" else [])
