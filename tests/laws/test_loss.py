"""Laws 1 to 3, on every loss of conf/loss: nothing here knows which one it is."""

import pytest
import torch

from tercet.app.components import build
from tercet.losses.triplet_mining import MININGS
from tercet.types import Embeddings
from tests.conftest import choices, composed

LOSSES = choices("loss")
TRIPLET = ([], ["loss.form=softplus", "loss.divide_by=pairs", "loss.tile=2"])
VARIANTS = {
    "infonce": [[], ["loss.learn_temperature=true"], ["loss.direction=both"], ["loss.similarity=dot", "loss.temperature=1"],
                ["loss.hard_negative_weight=1.5"], ["loss.label_smoothing=0.1"]],
    "context": [["loss.context=4"], ["loss.context=4", "loss.self_logit=zero"],
                ["loss.context=8", "loss.similarity=cosine", "loss.temperature=0.05"]],
    "triplet": [["loss.divide_by=sum"], *([f"loss.mining={mining}", *more] for mining in MININGS for more in TRIPLET)],
}  # fmt: skip
CASES = [(name, variant) for name in LOSSES for variant in VARIANTS.get(name, [[]])]


def loss_of(name, variant):
    return build(composed(f"loss={name}", *variant).loss).double()


def rows(n=9, views=3, dim=6, labels="some", duplicates=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(views, n, dim, generator=g, dtype=torch.float64)
    label = {"none": torch.full((n,), -1), "some": torch.arange(n) % 4 - 1, "one": torch.zeros(n, dtype=torch.long)}[labels]
    content = torch.randperm(views * n, generator=g).view(views, n)
    if duplicates and n > 2:
        content[1, 1] = content[1, 0]
        content[0, 2] = content[0, 0]
    return Embeddings(z, torch.arange(n), label, torch.arange(n), content)


@pytest.mark.parametrize(("name", "variant"), CASES)
@pytest.mark.parametrize("views", [2, 3])
def test_splitting_the_anchors_changes_nothing(name, variant, views):
    loss, batch = loss_of(name, variant), rows(views=views)
    whole = loss(batch, batch)
    for cuts in ([1], [4, 5], list(range(1, 9))):
        parts = [loss(batch.select(part), batch) for part in torch.arange(9).tensor_split(cuts)]
        torch.testing.assert_close(sum(p.loss_sum for p in parts), whole.loss_sum)
        assert sum(p.normalizer for p in parts) == whole.normalizer
        for stat in whole.stats:
            torch.testing.assert_close(sum(p.stats[stat] for p in parts), whole.stats[stat])


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_the_order_of_the_keys_changes_nothing(name, variant):
    loss, batch = loss_of(name, variant), rows()
    torch.testing.assert_close(loss(batch, batch.select(torch.randperm(9))).loss_sum, loss(batch, batch).loss_sum)


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_the_gradient_is_the_derivative(name, variant):
    loss, batch = loss_of(name, variant), rows(n=5, dim=3)

    def total(z):
        moved = Embeddings(z, batch.example_id, batch.label, batch.position, batch.content_hash)
        return loss(moved, moved).loss_sum

    assert torch.autograd.gradcheck(total, batch.z.clone().requires_grad_())


DEGENERATE = {
    "one label": lambda: rows(labels="one"),
    "no label": lambda: rows(labels="none"),
    "one row": lambda: rows(n=1),
    "all cells equal": lambda: Embeddings(
        torch.ones(2, 4, 3, dtype=torch.float64), torch.arange(4), torch.full((4,), -1), torch.arange(4),
        torch.zeros(2, 4, dtype=torch.long)),
    "collapsed to zero": lambda: Embeddings(
        torch.zeros(2, 4, 3, dtype=torch.float64), torch.arange(4), torch.full((4,), -1), torch.arange(4),
        torch.arange(8).view(2, 4)),
    "the same example twice": lambda: rows(n=4).select(torch.tensor([0, 0, 1, 2])),
}  # fmt: skip


@pytest.mark.parametrize(("name", "variant"), CASES)
@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_batches_are_finite_and_keep_a_graph(name, variant, case):
    loss, batch = loss_of(name, variant), DEGENERATE[case]()
    z = batch.z.clone().requires_grad_()
    live = Embeddings(z, batch.example_id, batch.label, batch.position, batch.content_hash)
    terms = loss(live, live)
    assert terms.loss_sum.requires_grad
    terms.loss_sum.backward()
    assert torch.isfinite(terms.loss_sum)
    assert torch.isfinite(z.grad).all()


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_half_precision_scores_are_float32(name, variant):
    loss, batch = loss_of(name, variant).float(), rows()
    half = Embeddings(batch.z.bfloat16(), batch.example_id, batch.label, batch.position, batch.content_hash)
    full = Embeddings(half.z.float(), batch.example_id, batch.label, batch.position, batch.content_hash)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(loss(half, half).loss_sum, loss(full, full).loss_sum)


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_a_process_without_rows_keeps_a_graph(name, variant):
    loss, keys = loss_of(name, variant), rows(n=4)
    z = keys.z.clone().requires_grad_()
    live = Embeddings(z, keys.example_id, keys.label, keys.position, keys.content_hash)
    terms = loss(live.select(slice(0, 0)), live)
    terms.loss_sum.backward()
    assert float(terms.normalizer) == 0
    assert not z.grad.any()
