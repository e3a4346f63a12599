"""Labels that the model confuses come together."""

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F

from tercet.app.components import build
from tercet.errors import InputError
from tercet.evaluation.search import FalseNegativeFilter, hard_negatives
from tercet.training.callbacks import HardLabels
from tercet.training.callbacks.hard_labels import confusable_labels, embed_rows, nearest_positive
from tests.laws import distributed_runs


def fit(tmp_path, callback, epochs, *overrides):
    cfg = distributed_runs.config("facenet", *overrides)
    pl.seed_everything(0, verbose=False)
    module, data = build(cfg.objective), distributed_runs.data(cfg, tmp_path, 4)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[callback],
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    return trainer, module, data


class Spy(HardLabels):
    """Remembers when it looked, and what was drawn afterwards."""

    def __init__(self, *values):
        super().__init__(*values)
        self.looked = []

    def on_train_epoch_start(self, trainer, pl_module):
        super().on_train_epoch_start(trainer, pl_module)
        self.looked.append(dict(trainer.datamodule.sampler.neighbors))


def test_every_other_epoch_the_current_model_is_asked(tmp_path):
    spy = Spy(2, 100, 1, 1.0, None)
    trainer, module, data = fit(tmp_path, spy, 5)
    assert spy.looked[:2] == [{}, {}]
    assert spy.looked[2] == spy.looked[3] != {}
    assert data.sampler.neighbors == spy.state_dict()["neighbors"]
    # What the sampler was told is what a plain search says of the same model.
    z, label = embed_rows(trainer, module, spy._sample_rows(data.sampler, 4))
    assert sorted(set(label.tolist())) == sorted(data.sampler.rows_by_label)
    cosine = (z @ z.T).masked_fill(label[:, None] == label, -torch.inf)
    best = label[cosine.argmax(1)]
    found = confusable_labels(label, cosine.amax(1, keepdim=True), cosine.argmax(1, keepdim=True), 1)
    for name, (other,) in found.items():
        assert other in best[label == name].tolist()
    assert module.encoder.training


def test_a_run_that_goes_on_has_its_neighbors(tmp_path):
    callback = HardLabels(3, 100, 2, 1.0, None)
    callback.load_state_dict({"neighbors": {0: [1]}})
    _, _, data = fit(tmp_path, callback, 1)
    assert data.sampler.neighbors == {0: [1]}


def test_it_needs_batches_of_labels(tmp_path):
    with pytest.raises(InputError, match="needs a PKBatchSampler, but the sampler is RandomBatchSampler"):
        fit(tmp_path, HardLabels(1, 100, 2, 1.0, None), 1, "sampler=random")


def test_wrong_numbers_are_named():
    with pytest.raises(InputError, match="every=0"):
        HardLabels(0, 100, 2, 1.0, None)


def test_mislabeled_rows_are_guarded_against():
    # Two labels in two directions; row 4 has label 2, but lies on top of label 0.
    z = F.normalize(torch.tensor([[1.0, 0], [0.8, 0.6], [0, 1.0], [0.6, 0.8], [1.0, 0.01]]), dim=-1)
    label = torch.tensor([0, 0, 1, 1, 2])

    def neighbors(guard):
        limit = guard.limit(nearest_positive(z, label))
        scores, at = hard_negatives(z, z, lambda rows, keys: label[keys] != label[rows, None], limit, 1)
        return confusable_labels(label, scores, at, 1)

    assert neighbors(FalseNegativeFilter(1.0, None))[0] == [2]
    assert neighbors(FalseNegativeFilter(0.97, None))[0] == [1]
    assert neighbors(FalseNegativeFilter(1.0, 0.01)).get(0) in ([2], [1], None)
    assert nearest_positive(z, label)[:4].tolist() == pytest.approx([0.8, 0.8, 0.8, 0.8])
    assert nearest_positive(z, label)[4].isnan()
