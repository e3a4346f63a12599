"""Classification: cross entropy of labels, by a linear layer that is no part of the model."""

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from PIL import Image

from tercet.data import ImageFiles, ImageTransform, RandomBatchSampler, TextTransform
from tercet.errors import InputError
from tercet.images import PixelFormat
from tercet.models import ImageEncoder, load, random_backbone, save_model
from tercet.training import Classification, DataModule
from tercet.types import Batch
from tests.conftest import TEXTS
from tests.laws.distributed_runs import Listed, tokenizer


def batch(encoder, label):
    ids = torch.arange(len(label))
    return Batch(tuple(encoder.prepare(TEXTS[i : i + len(label)]) for i in range(2)), ids, label, ids, ids.expand(2, -1))


def fit(tmp_path, encoder, data, **settings):
    module = Classification(encoder, lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2), **settings)
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=12, max_epochs=-1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    return module, {name: float(x) for name, x in trainer.callback_metrics.items()}


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_torchs_over_the_labeled_items_of_every_column(encoder, smoothing):
    module = Classification(encoder.eval(), num_classes=3, temperature=0.5, label_smoothing=smoothing)
    label = torch.tensor([2, -1, 0, 0, 1])
    rows = batch(encoder, label)
    value = module.training_step(rows, 0)
    z = torch.cat([encoder(view)[label >= 0] for view in rows.views])
    logits = (z @ module.classifier.weight.T + module.classifier.bias) / 0.5
    expected = F.cross_entropy(logits, label[label >= 0].repeat(2), label_smoothing=smoothing)
    torch.testing.assert_close(value, expected)
    nothing = module.training_step(batch(encoder, torch.full((3,), -1)), 0)
    nothing.backward()
    assert float(nothing) == 0 and encoder.backbone.embeddings.word_embeddings.weight.grad is not None


@pytest.mark.filterwarnings("ignore")
def test_texts_with_labels_are_learned_and_the_layer_is_left_behind(tmp_path, encoder):
    rows = Listed(("a",), label=True, twice=False)
    data = DataModule(rows, TextTransform(tokenizer(), 32, str(tmp_path)), RandomBatchSampler, 12)
    module, logged = fit(tmp_path, encoder, data)
    assert module.classes.tolist() == [0, 1, 2] and module.classifier.out_features == 3
    assert logged["train/accuracy"] > 0.9 and logged["train/loss"] < 0.5
    save_model(encoder, tmp_path / "model")
    assert not [path for path in (tmp_path / "model").rglob("*") if "classif" in path.name]
    again = load(tmp_path / "model")
    torch.testing.assert_close(again.encode(TEXTS[:2]), encoder.encode(TEXTS[:2]))


@pytest.mark.filterwarnings("ignore")
def test_images_with_labels_are_learned(tmp_path):
    for name, color in (("dark", 20), ("light", 220)):
        (tmp_path / "people" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("L", (20, 20), color + i).save(tmp_path / "people" / name / f"{i}.png")
    pixels = PixelFormat(size=16, channels=1, mean=[0.5], std=[0.25])
    sizes = {"embedding_size": 4, "hidden_sizes": [4], "depths": [1], "layer_type": "basic", "num_channels": 1}
    model = ImageEncoder(random_backbone({"model_type": "resnet", **sizes}), pixels, norm="group")
    data = DataModule(ImageFiles(str(tmp_path / "people")), ImageTransform(pixels), RandomBatchSampler, 8)
    _, logged = fit(tmp_path, model, data)
    assert logged["train/accuracy"] == 1.0


@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_classified_is_said(tmp_path, encoder):
    data = DataModule(Listed(("a",)), TextTransform(tokenizer(), 32, str(tmp_path)), RandomBatchSampler, 4)
    with pytest.raises(InputError, match=r"two labels or more; the training rows have 0\. Name the column"):
        fit(tmp_path, encoder, data)
    for wrong in ({"num_classes": 1}, {"temperature": 0}, {"label_smoothing": 1}):
        with pytest.raises(InputError, match=f"^{next(iter(wrong))}="):
            Classification(encoder, **wrong)
