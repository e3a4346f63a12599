"""The triplet loss against its twin; threads, memory, precision and messages."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tercet.errors import InputError
from tercet.losses import TripletLoss, mine
from tercet.losses.triplet_mining import MININGS, ONE_NEGATIVE
from tercet.types import Embeddings
from tests.losses.triplet_twin import batches, twin

DEFAULTS = dict(margin=0.2, mining="semihard", fallback=False, form="hinge", divide_by="active", tile=None)
RULES = [(mining, False) for mining in MININGS] + [("semihard", True), ("easy_positive", True)]
FORMS = ("hinge", "softplus")
SETTINGS = st.fixed_dictionaries(
    {
        "margin": st.sampled_from([0.2, 1.0, 4.0]),  # 1 is a distance between corners: ties with the margin
        "divide_by": st.sampled_from(["active", "pairs", "sum"]),
    }
)


def live(e):
    return Embeddings(e.z.clone().requires_grad_(), e.example_id, e.label, e.position, e.content_hash)


def graded(loss, anchors, keys):
    """Value, count, and the gradients of the anchors and of the keys."""
    anchors, keys = live(anchors), live(keys)
    total, count = loss(anchors, keys)
    return total.detach(), float(count), *torch.autograd.grad(total, (anchors.z, keys.z), allow_unused=True)


def ours(options):
    loss = TripletLoss(**options)

    def call(anchors, keys):
        terms = loss(anchors, keys)
        return terms.loss_sum, terms.normalizer

    return call


def check(options, batch, gradient=True):
    expected = graded(lambda a, k: twin(a, k, **{o: v for o, v in options.items() if o != "tile"}), *batch)
    got = graded(ours(options), *batch)
    for e, g in zip(expected[: 4 if gradient else 2], got, strict=False):
        torch.testing.assert_close(g, torch.zeros_like(g) if e is None else e, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("mining", "fallback"), RULES)
@pytest.mark.parametrize("form", FORMS)
@given(more=SETTINGS, tile=st.sampled_from([None, 1, 2, 5]), batch=batches(corners=False))
@settings(max_examples=40, deadline=None)
def test_equals_its_twin(mining, fallback, form, more, tile, batch):
    check(dict(mining=mining, fallback=fallback, form=form, tile=tile, **more), batch)


@pytest.mark.parametrize(("mining", "fallback"), RULES)
@pytest.mark.parametrize("form", FORMS)
@given(more=SETTINGS, tile=st.sampled_from([None, 1, 2, 5]), batch=batches(corners=True))
@settings(max_examples=40, deadline=None)
def test_equals_its_twin_where_distances_tie(mining, fallback, form, more, tile, batch):
    """Of equally near negatives any one may get the gradient, so that a rule of one negative is held to its value."""
    check(dict(mining=mining, fallback=fallback, form=form, tile=tile, **more), batch, mining not in ONE_NEGATIVE)


@pytest.mark.parametrize(("mining", "fallback"), [rule for rule in RULES if rule[0] != "all_semihard"])
@pytest.mark.parametrize("form", FORMS)
@given(batch=batches(corners=False))
@settings(max_examples=20, deadline=None)
def test_without_a_margin(mining, fallback, form, batch):
    """Softplus is then the soft margin; a hinge sees only the negatives that are nearer."""
    options = {**DEFAULTS, "mining": mining, "fallback": fallback, "form": form, "margin": 0.0}
    if form == "hinge" and mining in ("semihard", "easy_positive") and not fallback:
        with pytest.raises(InputError, match=f"^margin=0.0 leaves mining={mining} nothing"):
            TripletLoss(**options)
    else:
        check(options, batch)


def unit(n, dim=8, labels=5, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(1, n, dim, generator=g, dtype=dtype)
    row = torch.arange(n)
    return Embeddings(z, row, row % labels, row, row[None])


@pytest.mark.parametrize(("mining", "fallback"), RULES)
@pytest.mark.parametrize("form", FORMS)
def test_float32_equals_float64(mining, fallback, form):
    options, batch = {**DEFAULTS, "mining": mining, "fallback": fallback, "form": form}, unit(60)
    double = Embeddings(batch.z.double(), batch.example_id, batch.label, batch.position, batch.content_hash)
    single = graded(ours(options), batch, batch)
    for s, d in zip(single, graded(ours(options), double, double), strict=True):
        torch.testing.assert_close(torch.as_tensor(s).double(), torch.as_tensor(d).double(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing(threads):
    batch, before = unit(50), torch.get_num_threads()
    expected = graded(ours(DEFAULTS), batch, batch)
    try:
        torch.set_num_threads(threads)
        got = graded(ours(DEFAULTS), batch, batch)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(got, expected)


class Largest(TorchDispatchMode):
    """The most numbers that any tensor holds, of all that are made."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for made in tree_leaves(out):
            if isinstance(made, torch.Tensor):
                self.numbers = max(self.numbers, made.numel())
        return out


@pytest.mark.parametrize("mining", MININGS)
@pytest.mark.parametrize("form", FORMS)
def test_no_tensor_of_all_pairs_is_made(mining, form):
    n, tile, dim = 2048, 16, 8
    batch = live(unit(n, dim, labels=n // 8))
    with Largest() as largest:
        terms = TripletLoss(**{**DEFAULTS, "mining": mining, "form": form, "tile": tile})(batch, batch)
        terms.loss_sum.backward()
    assert largest.numbers <= 2 * n * max(tile, dim) < n * n / 50  # 2: sorting packs a distance and its place


@pytest.mark.parametrize("mining", MININGS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_an_embedding_that_is_not_finite_is_not_hidden(mining, bad):
    """The loss is NaN, so that the objective stops the run."""
    batch = unit(12)
    batch.z[0, 3, 0] = bad
    assert TripletLoss(**{**DEFAULTS, "mining": mining})(batch, batch).loss_sum.isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_scored_in_float32(dtype):
    batch = unit(40)
    half = Embeddings(batch.z.to(dtype), batch.example_id, batch.label, batch.position, batch.content_hash)
    full = Embeddings(half.z.float(), batch.example_id, batch.label, batch.position, batch.content_hash)
    with torch.autocast("cpu", torch.bfloat16):
        got = graded(ours(DEFAULTS), half, half)
    expected = graded(ours(DEFAULTS), full, full)
    assert got[2].dtype == dtype
    torch.testing.assert_close(got[0], expected[0])
    torch.testing.assert_close(got[2].float(), expected[2], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("mining", MININGS)
def test_the_sum_of_the_equation_is_not_divided(mining):
    """Equation 3 literally: the mean over active triplets times their number."""
    z, labels = torch.randn(20, 4, dtype=torch.float64), torch.arange(20) % 4
    mean, total = (float(TripletLoss(mining=mining, divide_by=kind)(z, labels)) for kind in ("active", "sum"))
    number = sum(found.shape[1] for found in mine(z, labels, mining=mining))
    assert number > 1 and total == pytest.approx(number * mean)
    assert TripletLoss(divide_by="sum").collapsed_loss is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mining": "semi"}, "mining=semi: choose one of semihard, easy_positive, batch_hard, all_semihard"),
        ({"form": "relu"}, "form=relu: choose one of hinge, softplus"),
        ({"divide_by": "all"}, "divide_by=all: choose one of active, pairs, sum"),
        ({"margin": -0.1}, "margin=-0.1: "),
        ({"margin": 5}, "margin=5: "),
        ({"margin": float("nan")}, "margin=nan: "),
        ({"margin": 0, "form": "softplus", "mining": "all_semihard"}, "margin=0 leaves mining=all_semihard"),
        ({"fallback": True, "mining": "all"}, "fallback=true is for mining=semihard and easy_positive, not"),
        ({"tile": 0}, "tile=0: "),
    ],
)
def test_wrong_settings_name_their_parameter(wrong, message):
    with pytest.raises(InputError) as error:
        TripletLoss(**wrong)
    assert str(error.value).startswith(message)
