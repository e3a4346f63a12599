"""A loss over slices of its anchors is the loss: value, gradient and statistics."""

import pytest
import torch

from tercet.losses import base
from tercet.types import Embeddings
from tests.laws.test_loss import CASES, loss_of, rows

SLICED = [case for case in CASES if case[0] != "triplet"]  # mining has tiles of its own


def outcome(loss, batch):
    z = batch.z.clone().requires_grad_()
    loss.zero_grad()
    live = Embeddings(z, batch.example_id, batch.label, batch.position, batch.content_hash)
    terms = loss(live, live)
    terms.loss_sum.backward()
    own = {name: p.grad.clone() for name, p in loss.named_parameters()}
    return terms, {"z": z.grad, **own}


@pytest.mark.parametrize(("name", "variant"), SLICED)
@pytest.mark.parametrize("tile", [1, 40, 10_000])
@pytest.mark.parametrize("views", [1, 3])
def test_slices_change_nothing(name, variant, tile, views, monkeypatch):
    loss, batch = loss_of(name, variant), rows(n=9, views=views, duplicates=views > 1)
    whole, expected = outcome(loss, batch)
    monkeypatch.setattr(base, "DENSE", 0)
    monkeypatch.setattr(base, "MIN_ROWS", 1)
    monkeypatch.setattr(base, "TILE", tile)
    cut, got = outcome(loss, batch)
    torch.testing.assert_close(cut.loss_sum, whole.loss_sum)
    assert cut.normalizer == whole.normalizer
    for stat, value in whole.stats.items():
        torch.testing.assert_close(cut.stats[stat], value)
    for key, gradient in expected.items():
        torch.testing.assert_close(got[key], gradient)


def test_scores_are_kept_up_to_a_size_only(monkeypatch):
    """Of what autograd keeps, nothing has the size of the score matrix once there are slices."""
    name, variant = SLICED[0]
    loss, batch = loss_of(name, variant), rows(n=64, views=2)
    kept = []

    def largest():
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            live = Embeddings(
                batch.z.clone().requires_grad_(), batch.example_id, batch.label, batch.position, batch.content_hash
            )
            loss(live, live)
        return max(kept, default=0)

    assert largest() >= 64 * 64
    monkeypatch.setattr(base, "DENSE", 0)
    monkeypatch.setattr(base, "MIN_ROWS", 1)
    monkeypatch.setattr(base, "TILE", 64)
    assert largest() <= batch.z.numel()
