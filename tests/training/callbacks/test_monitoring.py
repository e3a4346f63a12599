"""The watch speaks when everything is one point, and not before; clipping uses the norm that it has measured."""

import logging

import pytest
import pytorch_lightning as pl
import torch

from tercet.app.components import build
from tercet.training.callbacks import CollapseWarning, SkipNonFinite
from tests.laws import distributed_runs


def train(tmp_path, collapsed, mining, form="hinge"):
    """Seven steps of an encoder that gives every row the same vector, or of a sound one."""
    cfg = distributed_runs.config("facenet", f"loss.mining={mining}", f"loss.form={form}")
    module = build(cfg.objective)
    if collapsed:
        finish = module.encoder.pool
        noise = 1e-4 * torch.randn(400, module.encoder.dim, generator=torch.Generator().manual_seed(0))
        module.encoder.pool = lambda *a: (z := finish(*a)) * 1e-9 + 1 + noise[: len(z)]
    module.optimizer = lambda m: torch.optim.SGD(m.parameters(), lr=1e-6)
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=7, logger=False, log_every_n_steps=1, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[CollapseWarning(0.01, 3)],
    )  # fmt: skip
    trainer.fit(module, datamodule=distributed_runs.data(cfg, tmp_path, 6))
    return {name: float(x) for name, x in trainer.callback_metrics.items()}


@pytest.mark.parametrize(("mining", "form"), [("all", "hinge"), ("semihard", "hinge"), ("all", "softplus")])
def test_a_collapsed_encoder_is_named_once(tmp_path, caplog, mining, form):
    with caplog.at_level(logging.WARNING, "tercet"):
        seen = train(tmp_path, True, mining, form)
    assert seen["train/spread"] < 1e-3
    assert seen["train/mean_norm"] > 0.999
    said = [r.message for r in caplog.records if r.message.startswith("Collapse: at step 3 ")]
    assert len(said) == 1
    assert "easier mining" in said[0]


def test_a_sound_one_is_not(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "tercet"):
        seen = train(tmp_path, False, "all")
    assert seen["train/spread"] > 0.01
    assert {"train/active", "train/positive_distance", "train/negative_distance"} <= seen.keys()
    assert "Collapse" not in caplog.text


@pytest.mark.parametrize(("how", "value"), [("norm", 0.01), ("value", 1e-4), (None, 0.01), (None, None)])
def test_gradients_are_clipped_by_the_norm_that_is_known_already(tmp_path, how, value):
    """``SkipNonFinite`` has computed it; the weights are those that Lightning's own clipping gives."""
    cfg, weights = distributed_runs.config("simcse_unsup"), []
    for callbacks in ([], [SkipNonFinite()]):
        torch.manual_seed(0)
        module = build(cfg.objective)
        trainer = pl.Trainer(
            accelerator="cpu", max_steps=3, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, gradient_clip_val=value, gradient_clip_algorithm=how, callbacks=callbacks,
        )  # fmt: skip
        trainer.fit(module, datamodule=distributed_runs.data(cfg, tmp_path, 6))
        weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
        assert module.gradient_norm is None, "of a step that is over"
    assert torch.equal(*weights)
