"""Law 9: a step asks nothing of the device, and the number of device operations stays within a stated budget."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

from tercet.distributed import reduce_loss
from tercet.training import contrastive
from tercet.types import Embeddings, LossOutput, TokenBatch
from tests.laws.device_operations import DeviceOperations, HostWaitsError, do_as_on_a_gpu
from tests.laws.test_loss import CASES, loss_of, rows

# Operations of the forward and backward pass of two views; a bare loop's cross entropy of normalized rows has 49.
BUDGETS = {
    "infonce": {"": 72, "learn_temperature": 82, "both": 124, "dot": 56, "hard_negative_weight": 72, "label_smoothing": 88},
    "context": {"": 70, "zero": 72, "cosine": 86},
    "triplet": {"": 130, "easy_positive": 132, "batch_hard": 134, "all_semihard": 142, "hard": 144, "all": 144},
}
MOST = 2000  # in tiles of two anchors, each of which has the operations of a batch


def budget(name, variant):
    """The budget of the last word that it names; that of the loss as it is where it names none."""
    stated, words = BUDGETS.get(name, {}), "=".join(variant)
    return MOST if "loss.tile" in words else next((n for word, n in reversed(stated.items()) if word in words), MOST)


def backward(loss, batch):
    z = batch.z.clone().requires_grad_()
    live = Embeddings(z, batch.example_id, batch.label, batch.position, batch.content_hash)
    output = loss(live, live)
    output.loss_sum.backward()
    return {**vars(output), "loss_sum": output.loss_sum.detach()}, z.grad


@pytest.mark.parametrize(("name", "variant"), CASES)
@pytest.mark.parametrize("views", [1, 2, 3])
def test_a_loss_asks_nothing_of_the_device(name, variant, views, monkeypatch):
    loss, batch = loss_of(name, variant), rows(n=16, views=views, duplicates=False)
    do_as_on_a_gpu(monkeypatch)
    with DeviceOperations() as operations:
        backward(loss, batch)
    if views == 2:
        assert operations.total <= budget(name, variant), operations.counts


@pytest.mark.parametrize(("name", "variant"), CASES)
@pytest.mark.parametrize("labels", ["none", "some", "one"])
def test_a_loss_on_a_gpu_is_that_of_a_cpu(name, variant, labels, monkeypatch):
    loss, batch = loss_of(name, variant), rows(n=12, labels=labels)
    expected, gradient = backward(loss, batch)
    do_as_on_a_gpu(monkeypatch)
    output, got = backward(loss, batch)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(got, gradient)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "variant"), CASES)
@pytest.mark.parametrize("labels", ["none", "some"])
def test_no_loss_waits_for_a_gpu(name, variant, labels):
    """Neither forward nor backward; value, statistics and gradient are those of a CPU."""
    loss, batch = loss_of(name, variant), rows(n=100, labels=labels)
    expected, gradient = backward(loss, batch)
    on_gpu = Embeddings(**{field: x.cuda() for field, x in vars(batch).items()})
    backward(loss.cuda(), on_gpu)  # the first call makes cuBLAS ready, for which the host waits
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        output, got = backward(loss, on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    torch.testing.assert_close(output, expected, check_device=False)
    torch.testing.assert_close(got, gradient, check_device=False)


@pytest.mark.parametrize("views", [1, 2])
def test_what_is_logged_asks_nothing_of_the_device(views):
    """In steps that log: the statistics of the embeddings, and the means over all processes."""
    batch = rows(n=16, views=views, duplicates=False)
    with DeviceOperations() as operations:
        stats = {"accuracy": batch.z.new_ones(2), **contrastive._alignment(batch)}
        logged = reduce_loss(LossOutput(batch.z.sum(), batch.z.new_ones(()), stats))[1]
        logged |= contrastive._geometry(batch.z[0], batch.z[0])
    assert logged.keys() >= {"accuracy", "uniformity", "spread", "mean_norm"}
    assert operations.total <= 60, operations.counts


def test_a_loss_of_another_kind_has_no_budget_yet():
    assert {name for name, _ in CASES} == BUDGETS.keys()


@pytest.mark.parametrize(
    "asks",
    [
        lambda x: float(x.sum()), lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: x.unique(), lambda x: bool(x[0] > 0),
        lambda x: torch.arange(3).repeat_interleave(torch.ones(3).long()), lambda x: x.masked_select(x > 0),
        lambda x: x.index_put_((x > 0,), torch.zeros(())), lambda x: x.new_tensor(1.0), lambda x: x[[0, 1]],
        lambda x: torch.equal(x, x), lambda x: x.long().abs().bincount(),
    ],
)  # fmt: skip
def test_what_makes_the_host_wait_is_refused(asks):
    x = torch.randn(4)
    with pytest.raises(HostWaitsError), DeviceOperations():
        asks(x)


def test_the_host_waits_for_what_is_copied_to_it():
    """Else it could read what has not arrived yet."""

    class Copies(TorchFunctionMode):
        def __init__(self):
            super().__init__()
            self.waits = []

        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.Tensor.to:
                self.waits.append(not (kwargs or {}).get("non_blocking", False))
            return func(*args, **(kwargs or {}))

    batch = TokenBatch.from_lists([[1, 2], [3]])
    for device, waits in (("cpu", True), ("meta", False)):
        with Copies() as copies:
            batch.to(device)
        assert set(copies.waits) == {waits}
