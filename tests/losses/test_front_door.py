"""Losses called with tensors: they equal the loss on hand-made embeddings, in one process and in two."""

import math
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from tercet.errors import InputError
from tercet.losses import ContextLoss, InfoNCE, TripletLoss, mine, triplet_mining
from tercet.losses.triplet_mining import MININGS, ONE_NEGATIVE
from tercet.types import Embeddings
from tests.laws.device_operations import DeviceOperations
from tests.laws.distributed_runs import in_processes
from tests.losses.triplet_twin import batches, cells, chosen, roles

N, DIM = 7, 4
LABELS = torch.tensor([0, 0, 1, 1, 0, 2, -1])
DOCUMENTS, POSITIONS = torch.tensor([0, 0, 0, 1, 1, 1, -1]), torch.tensor([0, 1, 2, 4, 5, 6, 0])


def tensors(count, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(N, DIM, generator=g, dtype=torch.float64) for _ in range(count)]


def hand_made(views, label=None, position=None):
    row, none = torch.arange(N), torch.full((N,), -1)
    content = torch.arange(len(views) * N).view(-1, N)
    label, position = (none if x is None else x for x in (label, position))
    return Embeddings(torch.stack(views), row, label, position, content)


# name: the loss, how many tensors it takes, the call with rows ``r`` of them, and the same by hand
CALLS = {
    "pairs": (lambda: InfoNCE(learn_temperature=True), 2, lambda f, z, r: f(*z), lambda z: hand_made(z)),
    "hard negatives": (
        lambda: InfoNCE(hard_negative_weight=0.5), 3, lambda f, z, r: f(*z), lambda z: hand_made(z)),
    "two hard negatives": (
        InfoNCE, 4, lambda f, z, r: f(z[0], z[1], torch.stack(z[2:], 1)), lambda z: hand_made(z)),
    "labeled pairs": (
        lambda: InfoNCE(direction="both"), 2, lambda f, z, r: f(*z, labels=LABELS[r]), lambda z: hand_made(z, LABELS)),
    "in a ring": (lambda: InfoNCE(key_exchange="ring"), 2, lambda f, z, r: f(*z), lambda z: hand_made(z)),
    "one view": (InfoNCE, 1, lambda f, z, r: f(z[0], labels=LABELS[r]), lambda z: hand_made(z, LABELS)),
    "one view in a ring": (
        lambda: InfoNCE(key_exchange="ring"), 1, lambda f, z, r: f(z[0], labels=LABELS[r]), lambda z: hand_made(z, LABELS)),
    "triplets": (TripletLoss, 1, lambda f, z, r: f(z[0], LABELS[r]), lambda z: hand_made(z, LABELS)),
    "triplets of views": (
        lambda: TripletLoss(divide_by="pairs"), 3, lambda f, z, r: f(torch.stack(z)), lambda z: hand_made(z)),
    "context": (
        ContextLoss, 1, lambda f, z, r: f(z[0], DOCUMENTS[r], POSITIONS[r]),
        lambda z: hand_made([z[0], z[0]], DOCUMENTS, POSITIONS)),
    "context of two vectors": (
        lambda: ContextLoss(context=2), 2, lambda f, z, r: f(torch.stack(z), DOCUMENTS[r].tolist(), POSITIONS[r].numpy()),
        lambda z: hand_made(z, DOCUMENTS, POSITIONS)),
}  # fmt: skip


def outcome(name, rows=slice(0, N)):
    """The value, the gradient of each tensor's rows, and those of the loss's parameters, as lists."""
    make, count, call, _ = CALLS[name]
    loss = make().double()
    z = [x[rows].requires_grad_() for x in tensors(count)]
    value = call(loss, z, rows)
    value.backward()
    return float(value.detach()), [x.grad.tolist() for x in z], [float(p.grad) for p in loss.parameters()]


@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_the_mean_of_the_loss_on_embeddings(name):
    make, count, call, by_hand = CALLS[name]
    z = [x.requires_grad_() for x in tensors(count)]
    value = call(make().double(), z, slice(0, N))
    batch = by_hand(z)
    output = make().double()(batch, batch)
    assert value.shape == () and float(value.detach()) > 0
    torch.testing.assert_close(value, output.loss_sum / output.normalizer)
    got, expected = (torch.autograd.grad(x, z) for x in (value, output.loss_sum / output.normalizer))
    torch.testing.assert_close(got, expected)


PARTS = [slice(0, 3), slice(3, N)]


def outcomes_of_this_process():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {name: outcome(name, PARTS[dist.get_rank()]) for name in CALLS}
    with DeviceOperations(refuse=False) as operations:
        outcome("hard negatives", PARTS[dist.get_rank()])
    collectives = {name.split(".")[1]: n for name, n in operations.counts.items() if name.startswith("c10d.")}
    return {**found, "collectives": collectives}


@pytest.fixture(scope="module")
def processes():
    results = in_processes(2, outcomes_of_this_process)
    return [results[0], results[1]]


@pytest.mark.parametrize("name", CALLS)
def test_two_processes_are_one(processes, name):
    """The mean of the values is the value; the mean of the gradients is the gradient, as DDP makes it."""
    value, gradients, learned = outcome(name)
    (first, of_first, one), (second, of_second, other) = (process[name] for process in processes)
    assert (first + second) / 2 == pytest.approx(value)
    for whole, *parts in zip(gradients, of_first, of_second, strict=True):
        torch.testing.assert_close(torch.tensor(parts[0] + parts[1]) / 2, torch.tensor(whole))
    assert [(a + b) / 2 for a, b in zip(one, other, strict=True)] == pytest.approx(learned)


def test_a_step_has_one_collective_for_keys_and_one_for_their_gradient(processes):
    """And one for the sums that are divided; the hosts tell each other the numbers of rows."""
    for process in processes:
        assert process["collectives"] == {"allgather_": 2, "reduce_scatter_": 1, "allreduce_": 1}


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_one_view_with_labels_is_supcon(smoothing):
    """Khosla et al. 2020, eq. 2, as a loop over rows; rows without a positive have no loss and are not counted."""
    z = tensors(1)[0]
    unit, losses = z / z.norm(dim=1, keepdim=True), []
    for i in range(N):
        logits = {k: float(unit[i] @ unit[k]) / 0.1 for k in range(N) if k != i}
        positives = [logits[p] for p in logits if LABELS[p] == LABELS[i] >= 0]
        if positives:
            target = (1 - smoothing) * sum(positives) / len(positives) + smoothing * sum(logits.values()) / len(logits)
            losses.append(math.log(sum(map(math.exp, logits.values()))) - target)
    loss = InfoNCE(temperature=0.1, label_smoothing=smoothing).double()
    assert float(loss(z, labels=LABELS)) == pytest.approx(sum(losses) / len(losses))
    batch = hand_made([z], LABELS)
    output = loss(batch, batch)
    assert (int(output.normalizer), output.stats["accuracy"][1]) == (len(losses), len(losses))
    parts = [loss(batch.select(part), batch) for part in torch.arange(N).tensor_split(3)]
    torch.testing.assert_close(sum(part.loss_sum for part in parts), output.loss_sum)
    assert torch.autograd.gradcheck(lambda x: loss(x, labels=LABELS), z.requires_grad_())


@pytest.mark.parametrize("labels", [[0], [0, 1, 2, 3], [-1, -1]])
def test_one_view_without_positives_is_zero_with_a_zero_gradient(labels):
    z = torch.randn(len(labels), 3, requires_grad=True)
    for smoothing in (0.0, 0.1):
        value = InfoNCE(label_smoothing=smoothing)(z, labels=labels)
        (gradient,) = torch.autograd.grad(value, z)
        assert (float(value), gradient.abs().max()) == (0, 0)


def test_what_is_left_out_is_made():
    """With the same id or content in all rows every row would be a positive or no negative: the loss would be 0."""
    z = torch.eye(4)
    assert float(InfoNCE(temperature=1.0)(z, z)) == pytest.approx(math.log(math.e + 3) - 1)
    zero = [0] * 4
    assert float(InfoNCE(temperature=1.0)(z, z, content=zero)) == pytest.approx(0)
    assert float(InfoNCE(temperature=1.0)(z, z, content=torch.arange(8).view(2, 4))) > 0.7
    assert float(TripletLoss(mining="all", margin=4)(z, [0, 0, 1, 1], content=zero)) == 0


def triplets(*arguments, **options):
    return torch.cat(list(mine(*arguments, **options)), 1)


@pytest.mark.parametrize(
    ("mining", "fallback"), [*((mining, False) for mining in MININGS), ("semihard", True), ("easy_positive", True)]
)
@pytest.mark.parametrize("form", ["hinge", "softplus"])
@pytest.mark.parametrize("corners", [False, True], ids=["no ties", "ties"])
@given(data=st.data(), margin=st.sampled_from([0.2, 1.0, 4.0]), tile=st.sampled_from([None, 1, 2]))
@settings(max_examples=25, deadline=None)
def test_mined_triplets_are_those_that_the_loss_counts(mining, fallback, form, corners, data, margin, tile):
    batch = data.draw(batches(corners))[1]
    if not len(batch):
        return
    x, y = cells(batch, 2), cells(batch, 3)
    near = (x.z[:, None] - y.z).square().sum(2)
    mined, _ = chosen(near, near, *roles(x, y), mining, fallback)
    if mining == "all_semihard" or form == "hinge":
        mined = mined & (near[:, :, None] - near[:, None, :] + margin > 0)
    options = {"mining": mining, "margin": margin, "fallback": fallback, "form": form}
    found = triplets(batch.z, batch.label, **options, tile=tile, ids=batch.example_id, content=batch.content_hash)
    anchor, positive, negative = found
    count = int(TripletLoss(**options)(batch, batch).normalizer)
    assert found.dtype == torch.long and found.shape == (3, count)
    assert bool((anchor[1:] >= anchor[:-1]).all())
    if corners and mining in ONE_NEGATIVE:  # of equal distances any one may be mined
        expected = mined.nonzero().T
        distances = [near[a, j].sort()[0] for a, *rest in (found, expected) for j in rest]
        torch.testing.assert_close(distances[:2], distances[2:])
        assert bool((roles(x, y)[0][anchor, positive] & roles(x, y)[1][anchor, negative]).all())
    else:
        assert {tuple(t) for t in found.T.tolist()} == {tuple(t) for t in mined.nonzero().tolist()}


def test_mined_triplets_come_in_chunks(monkeypatch):
    z, labels = torch.randn(40, 3), torch.arange(40) % 4
    whole = triplets(z, labels, "all", 4)
    monkeypatch.setattr(triplet_mining, "CHUNK", 50)
    parts = list(mine(z, labels, "all", 4))
    assert max(part.shape[1] for part in parts) < 50 + 40
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    assert whole.shape[1] == 40 * 9 * 30
    assert triplets(z[:2], [0, 1]).shape == (3, 0)


def test_mining_gives_the_gradient_of_the_loss():
    z = tensors(1)[0].requires_grad_()
    anchor, positive, negative = triplets(z, LABELS, "all")
    unit = torch.nn.functional.normalize(z, dim=1)
    gap = (unit[anchor] - unit[positive]).square().sum(1) - (unit[anchor] - unit[negative]).square().sum(1)
    value = TripletLoss(mining="all")(z, LABELS)
    torch.testing.assert_close((gap + 0.2).mean(), value)
    torch.testing.assert_close(*(torch.autograd.grad(x, z) for x in ((gap + 0.2).mean(), value)))


Z = torch.randn(4, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TripletLoss()(Z), "^labels: integers"),
        (lambda: TripletLoss()(Z, [0, 1]), r"^labels: shape \(4,\) is needed, .* got \(2,\)"),
        (lambda: TripletLoss()(Z, ["a", "b", "a", "b"]), "^labels: a tensor, array or list of integers is needed"),
        (lambda: InfoNCE()(Z, Z, content=[[1], [2, 3]]), "^content: a tensor, array or list of integers is needed"),
        (lambda: TripletLoss()(Z, torch.rand(4)), "^labels: integers are needed, got torch.float32"),
        (lambda: TripletLoss()(Z[:0], []), r"^z: .* not empty is needed, got torch.float32 \(0, 3\)"),
        (lambda: TripletLoss()(Z[0], [0]), r"^z: a float tensor of shape \(N, D\) or \(V, N, D\) .* got torch.float32 \(3,\)"),
        (lambda: TripletLoss()(Z.long(), [0] * 4), "^z: a float tensor .* got torch.int64"),
        (lambda: TripletLoss()([[0.1]], [0]), "^z: a float tensor .* got list"),
        (lambda: TripletLoss()(Z, [0] * 4, ids=[1]), r"^ids: shape \(4,\)"),
        (lambda: TripletLoss()(Z, [0] * 4, content=[[1]]), r"^content: shape \(1, 4\)"),
        (lambda: mine(Z, [0, 1]), "^labels: shape"),
        (lambda: mine(Z, [0] * 4, margin=9), "^margin=9"),
        (lambda: InfoNCE()(Z), "^documents: .* labels alone are enough"),
        (lambda: InfoNCE()(Z, None, Z, labels=[0] * 4), "^documents: .* without hard_negatives"),
        (lambda: InfoNCE()(Z, Z[:2]), r"^documents: .* \(4, 3\), a row for each anchor, .* got torch.float32 \(2, 3\)"),
        (lambda: InfoNCE()(Z[None], Z), r"^queries: .* \(N, D\) .* got torch.float32 \(1, 4, 3\)"),
        (lambda: InfoNCE()(Z, Z, Z[:, :2]), "^hard_negatives: .* a row"),
        (lambda: InfoNCE()(Z, Z, Z[None]), r"^hard_negatives: .* \(1, 4, 3\)"),
        (lambda: InfoNCE()(Z, Z, labels=[0]), "^labels: shape"),
        (lambda: ContextLoss()(Z, [0] * 4), "^positions: the position"),
        (lambda: ContextLoss()(Z, [0] * 3, [0] * 4), "^documents: shape"),
        (lambda: ContextLoss()(Z, [0] * 4, [0] * 3), "^positions: shape"),
        (lambda: ContextLoss()(Z.expand(3, 4, 3), [0] * 4, [0] * 4), "^z: one or two vectors"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_wrong_tensors_name_their_parameter(call, message):
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize(
    ("line", "absent"),
    [("import tercet; dir(tercet); tercet.__version__", "torch"), ("import tercet.losses; tercet.losses.mine", "transformers")],
)
def test_imports_are_light(line, absent):
    code = f"import sys, time; t = time.process_time(); {line}; print({absent!r} in sys.modules, time.process_time() - t)"
    found, seconds = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert found == "False"
    assert absent == "transformers" or float(seconds) < 1
