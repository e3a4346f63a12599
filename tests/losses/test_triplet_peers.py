"""Which settings are whose loss: value and gradient equal the library's definition and, where installed, its code."""

import pytest
import torch

from tercet.losses import TripletLoss
from tercet.types import Embeddings
from tests.losses.triplet_peers import addons, metric_learning, squared

MARGIN = 0.2
KINDS = {"semihard": "all_semihard", "hard": "hard", "all": "all"}  # pytorch-metric-learning's word, and ours
LABELS = {
    "three of each": [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3],
    "uneven": [0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 4],
    "one of each": list(range(12)),
}


def ours(z, label, mining, divide_by, fallback=False):
    n = torch.arange(len(label))
    batch = Embeddings(z[None], n, label, n, n[None])
    terms = TripletLoss(MARGIN, mining, fallback, "hinge", divide_by, None)(batch, batch)
    return terms.loss_sum / terms.normalizer.clamp(min=1)


def same(labels, first, second, seed=0):
    """Both losses of the same rows, and both gradients, are equal."""
    label = torch.tensor(LABELS.get(labels, labels))
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(len(label), 3, generator=g, dtype=torch.float64, requires_grad=True)
    values = first(z, label), second(z, label)
    torch.testing.assert_close(*values, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(*(torch.autograd.grad(v, z)[0] for v in values), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("labels", ["three of each", "uneven"])
@pytest.mark.parametrize("seed", range(3))
def test_the_fallback_over_pairs_is_tensorflow_addons(labels, seed):
    same(labels, lambda z, y: ours(z, y, "semihard", "pairs", fallback=True), lambda z, y: addons(z, y, MARGIN), seed=seed)


def test_without_negatives_tensorflow_addons_pulls_and_ours_does_not():
    """Its farthest of no negatives is at distance 0; a batch of one label then has a loss, of no triplet at all."""
    label, z = torch.zeros(4, dtype=torch.long), torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    d = squared(z)[~torch.eye(4, dtype=torch.bool)]
    torch.testing.assert_close(addons(z, label, MARGIN), (d + MARGIN).mean())
    assert torch.autograd.grad(addons(z, label, MARGIN), z)[0].any()
    own = ours(z, label, "semihard", "pairs", fallback=True)
    assert own == 0
    assert not torch.autograd.grad(own, z)[0].any()


def test_the_twin_of_tensorflow_addons_gives_the_number_of_its_documentation():
    z = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert float(addons(z, torch.tensor([0, 0]), 1.0, lambda x: squared(x).sqrt())) == pytest.approx(2.41421, abs=1e-5)


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_sets_over_active_are_pytorch_metric_learning(labels, kind, seed):
    same(labels, lambda z, y: ours(z, y, KINDS[kind], "active"), lambda z, y: metric_learning(z, y, MARGIN, kind), seed=seed)


@pytest.mark.parametrize("labels", ["three of each", "uneven"])
@pytest.mark.parametrize("kind", KINDS)
def test_sets_over_active_are_what_pytorch_metric_learning_computes(labels, kind):
    pytest.importorskip("pytorch_metric_learning")
    from pytorch_metric_learning import distances, losses, miners

    distance = distances.LpDistance(power=2)
    miner = miners.TripletMarginMiner(MARGIN, kind, distance=distance)
    theirs = losses.TripletMarginLoss(MARGIN, distance=distance)
    same(labels, lambda z, y: ours(z, y, KINDS[kind], "active"), lambda z, y: theirs(z, y, miner(z, y)))


@pytest.mark.parametrize("labels", ["three of each", "uneven"])
def test_the_fallback_over_pairs_is_what_sentence_transformers_computes(labels):
    library = pytest.importorskip("sentence_transformers.losses")
    metric = library.BatchHardTripletLossDistanceFunction.euclidean_distance

    def theirs(z, y):
        unit = torch.nn.functional.normalize(z, dim=-1)
        loss = library.BatchSemiHardTripletLoss(None, lambda x: metric(x, squared=True), MARGIN)
        return loss.batch_semi_hard_triplet_loss(y, unit)

    same(labels, lambda z, y: ours(z, y, "semihard", "pairs", fallback=True), theirs)
