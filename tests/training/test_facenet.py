"""FaceNet's step: 1,800 images, mined and differentiated in one forward pass; texts; pairs and triplets of columns."""

import pytest
import torch
import torch.nn.functional as F

from tercet.app.components import build
from tercet.models import Execution
from tercet.types import Batch, Images
from tests.conftest import TEXTS, composed, tiny

SMALL = ["model=resnet_small", "model.norm=group", "model.backbone.config.embedding_size=8", "model.pixels.size=16",
         "model.backbone.config.hidden_sizes=[8,16]", "model.backbone.config.depths=[1,1]"]  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:You are trying to `self.log")


def faces(labels=45, each=40):
    """Noise about a picture of each label."""
    g = torch.Generator().manual_seed(0)
    label = torch.arange(labels).repeat_interleave(each)
    pixels = torch.randint(0, 256, (labels, 1, 16, 16), generator=g)[label]
    noise = torch.randint(-99, 99, pixels.shape, generator=g)
    uid = torch.arange(len(label))
    return Batch((Images((pixels + noise).clamp(0, 255).byte()),), uid, label, uid, uid[None])


def step(execution, batch):
    torch.manual_seed(0)
    module = build(composed("objective=facenet", "data=faces", *SMALL).objective)
    module.encoder.execution = execution
    logged = {}
    module.log_dict = lambda values, **_: logged.update(values)
    value = module.training_step(batch, 0)
    value.backward()
    return float(value.detach()), {name: p.grad for name, p in module.named_parameters() if p.grad is not None}, logged


def test_1800_images_in_chunks_are_1800_images_at_once():
    batch = faces()
    value, whole, logged = step(Execution("padded", "torch", None, None, False), batch)
    again, chunked, _ = step(Execution("padded", "torch", None, 128, True), batch)
    assert 0 < value < 0.3
    assert again == pytest.approx(value, rel=1e-4)
    assert {"train/active", "train/positive_distance", "train/negative_distance", "train/spread", "train/mean_norm"} <= (
        logged.keys()
    )
    for name, gradient in whole.items():
        off = (chunked[name] - gradient).norm() / gradient.norm()
        assert off < 1e-2, name  # rounding makes a few of the 70,200 pairs choose the next negative


@pytest.mark.parametrize("columns", [2, 3])
def test_columns_are_positives_and_negatives_without_labels(columns):
    module = build(composed(*tiny("objective=facenet", "sampler=random", "loss.mining=all")).objective)
    views = tuple(module.encoder.prepare([f"{text} {v}" for text in TEXTS]) for v in range(columns))
    n = len(TEXTS)
    batch = Batch(views, torch.arange(n), torch.full((n,), -1), torch.arange(n), torch.arange(columns * n).view(columns, n))
    optimizer, gaps = torch.optim.AdamW(module.parameters(), lr=1e-3), []
    for _ in range(15):
        value = module.training_step(batch, 0)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        z = F.normalize(module.embed(batch).z.detach(), dim=-1)
        negatives = z[2] if columns == 3 else z[1].roll(1, 0)
        gaps.append(float((z[0] - negatives).square().sum(-1).mean() - (z[0] - z[1]).square().sum(-1).mean()))
    assert gaps[-1] > gaps[0] + 0.01


@pytest.mark.parametrize("norm", ["keep", "group"])
@pytest.mark.parametrize("rows", [0, 1])
def test_a_batch_of_which_no_image_could_be_read_costs_a_step_only(norm, rows):
    module = build(composed("objective=facenet", "data=faces", *SMALL, f"model.norm={norm}").objective)
    none = torch.zeros(rows, dtype=torch.long)
    pixels = torch.zeros(rows, 1, 16, 16, dtype=torch.uint8)
    batch = Batch((Images(pixels),), none, none, none, none[None], num_unreadable=6 - rows)
    value = module.training_step(batch, 0)
    value.backward()
    assert float(value.detach()) == 0
    assert all(p.grad is None or not p.grad.any() for p in module.parameters())
    assert module.num_unreadable == 6 - rows
