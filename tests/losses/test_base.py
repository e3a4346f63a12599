"""A loss over tiles of its anchors is the loss: value, gradient and statistics; no matrix of scores outlives its tile."""

import pytest
import torch

from tercet.losses import cross_entropy
from tercet.types import Embeddings
from tests.laws.test_loss import CASES, loss_of, rows

TILED = [case for case in CASES if case[0] != "triplet"]  # mining has tiles of its own


def outcome(loss, batch):
    z = batch.z.clone().requires_grad_()
    loss.zero_grad()
    live = Embeddings(z, batch.example_id, batch.label, batch.position, batch.content_hash)
    terms = loss(live, live)
    terms.loss_sum.backward()
    own = {name: p.grad.clone() for name, p in loss.named_parameters()}
    return terms, {"z": z.grad, **own}


@pytest.mark.parametrize(("name", "variant"), TILED)
@pytest.mark.parametrize("tile", [1, 40, 10_000])
@pytest.mark.parametrize("views", [1, 3])
def test_tiles_change_nothing(name, variant, tile, views, monkeypatch):
    loss, batch = loss_of(name, variant), rows(n=9, views=views, duplicates=views > 1)
    whole, expected = outcome(loss, batch)
    monkeypatch.setattr(cross_entropy, "CPU_TILE", tile)
    cut, got = outcome(loss, batch)
    torch.testing.assert_close(cut.loss_sum, whole.loss_sum)
    assert cut.normalizer == whole.normalizer
    for stat, value in whole.stats.items():
        torch.testing.assert_close(cut.stats[stat], value)
    for key, gradient in expected.items():
        torch.testing.assert_close(got[key], gradient)


@pytest.mark.parametrize(("name", "variant"), TILED)
def test_no_scores_are_kept(name, variant):
    """Of what autograd keeps, nothing has the size of the score matrix."""
    loss, batch, kept = loss_of(name, variant), rows(n=64, views=2), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        live = Embeddings(batch.z.clone().requires_grad_(), batch.example_id, batch.label, batch.position, batch.content_hash)
        loss(live, live)
    assert 0 < max(kept) <= batch.z.numel() < 64 * 64


@pytest.mark.parametrize(("name", "variant"), TILED)
def test_without_keys_there_is_no_loss(name, variant):
    loss, batch = loss_of(name, variant), rows(n=4)
    none = batch.select(slice(0, 0))
    terms = loss(none, none)
    assert float(terms.loss_sum) == float(terms.normalizer) == 0
