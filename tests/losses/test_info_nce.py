"""InfoNCE against a twin written as the papers write it: loops over rows, no matrix."""

import math
from unittest.mock import patch

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tercet.errors import InputError
from tercet.losses import InfoNCE, TripletLoss, cross_entropy
from tercet.types import Embeddings
from tests.laws.test_loss import rows

DEFAULTS = dict(
    temperature=0.05, learn_temperature=False, similarity="cosine", direction="forward", hard_negative_weight=0.0,
    label_smoothing=0.0, key_exchange="auto",
)  # fmt: skip


def similarity(x, y, kind):
    return float(x @ y / (x.norm() * y.norm())) if kind == "cosine" else float(x @ y)


def row_loss(batch, i, a, b, settings):
    """One anchor's loss: eq. 1, 5 and 8 of SimCSE, eq. 2 of SupCon, duplicates left out; None where it has no positive."""
    t, kind = settings["temperature"], settings["similarity"]
    positives, everyone = [], []
    mine = {int(batch.content_hash[a, i]), int(batch.content_hash[b, i])}
    for j in range(len(batch)):
        s = similarity(batch.z[a, i], batch.z[b, j], kind) / t
        own = bool(batch.example_id[i] == batch.example_id[j])
        same_label = bool(batch.label[i] >= 0 and batch.label[i] == batch.label[j])
        if (same_label and not own) if a == b else (same_label or own):
            positives.append(s)
            everyone.append(s)
        elif a == b and own:
            continue
        elif int(batch.content_hash[b, j]) not in mine and batch.content_hash[a, j] != batch.content_hash[a, i]:
            everyone.append(s)
    for v in range(2, len(batch.z)) if (a, b) == (0, 1) else ():
        for j in range(len(batch)):
            if int(batch.content_hash[v, j]) not in mine:
                extra = settings["hard_negative_weight"] if batch.example_id[i] == batch.example_id[j] else 0.0
                everyone.append(similarity(batch.z[a, i], batch.z[v, j], kind) / t + extra)
    if not positives:
        return None
    even = settings["label_smoothing"]
    target = (1 - even) * sum(positives) / len(positives) + even * sum(everyone) / len(everyone)
    return math.log(sum(math.exp(s) for s in everyone)) - target


def twin(batch, settings):
    """The loss's sum, and the number of anchors that have a positive."""
    directions = [(0, 0)] if len(batch.z) == 1 else [(0, 1), (1, 0)] if settings["direction"] == "both" else [(0, 1)]
    found = [[row_loss(batch, i, a, b, settings) for i in range(len(batch))] for a, b in directions]
    return sum(x for losses in found for x in losses if x is not None) / len(found), sum(x is not None for x in found[0])


@given(
    n=st.integers(1, 8), views=st.integers(1, 4), again=st.lists(st.integers(0, 7), max_size=3), seed=st.integers(0, 999),
    labels=st.sampled_from([1, 2, 4]), contents=st.sampled_from([3, 9, 1000]), tile=st.sampled_from([1, 20, 1000]),
    change=st.fixed_dictionaries({}, optional={
        "direction": st.just("both"), "hard_negative_weight": st.sampled_from([-1.0, 0.7]), "label_smoothing": st.just(0.2),
        "similarity": st.just("dot"), "temperature": st.just(1.0)}),
)  # fmt: skip
@hypothesis.settings(max_examples=100)
def test_any_batch_equals_its_twin(n, views, again, seed, labels, contents, tile, change):
    """Any labels, duplicates, several answers, examples drawn twice, hard negatives; whole, in tiles and in blocks of keys."""
    g, chosen = torch.Generator().manual_seed(seed), {**DEFAULTS, **change}
    label, content = torch.randint(-1, labels, (n,), generator=g), torch.randint(contents, (views, n), generator=g)
    which = torch.tensor([*range(n), *(i % n for i in again)])
    z = torch.randn(views, len(which), 3, generator=g, dtype=torch.float64)
    batch = Embeddings(z, which, label[which], which, content[:, which])
    expected, count = twin(batch, chosen)
    loss = InfoNCE(**chosen).double()
    with patch.object(cross_entropy, "CPU_TILE", tile):
        output = loss(batch, batch)
        ready = loss.prepare(batch)
        blocks = [loss.block_statistics(ready, ready.select(part)) for part in torch.arange(len(which)).tensor_split([n // 2])]
    for found in (output, loss.combine(torch.stack(blocks))):
        assert float(found.loss_sum.detach()) == pytest.approx(expected, rel=1e-6, abs=1e-6)
        assert int(found.normalizer) == count


@pytest.mark.parametrize("labels", ["none", "some", "one"])
@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("change", [{}, {"direction": "both"}, {"similarity": "dot", "temperature": 1.0},
                                    {"hard_negative_weight": -0.7}])  # fmt: skip
def test_equals_its_twin(labels, views, change):
    settings = {**DEFAULTS, **change}
    batch = rows(views=views, labels=labels)
    assert float(InfoNCE(**settings).double()(batch, batch).loss_sum) == pytest.approx(twin(batch, settings)[0])


def test_a_duplicate_is_never_a_negative():
    batch = rows(n=4, views=2, labels="none", duplicates=False)
    content = batch.content_hash.clone()
    content[1, 3] = content[1, 0]
    twin = Embeddings(batch.z, batch.example_id, batch.label, batch.position, content)
    moved = batch.z.clone()
    moved[1, 3] = moved[0, 0]  # as near to anchor 0 as can be
    near = Embeddings(moved, batch.example_id, batch.label, batch.position, content)
    loss = InfoNCE().double()
    first = slice(0, 1)
    torch.testing.assert_close(loss(near.select(first), near).loss_sum, loss(twin.select(first), twin).loss_sum)


QUESTIONS, ANSWERS = torch.tensor([7, 7, 7, 8, 9, 9]), torch.tensor([1, 2, 3, 4, 5, 4])


@pytest.mark.parametrize("loss", [InfoNCE(), InfoNCE(direction="both"), InfoNCE(similarity="dot", temperature=1.0),
                                  TripletLoss(mining="all", margin=4.0)], ids=str)  # fmt: skip
def test_an_answer_is_no_negative_of_its_question(loss):
    """Neither the other answers of the question, nor the other questions of the answer (the fourth is given twice)."""
    z = torch.randn(2, 6, 5, dtype=torch.float64, requires_grad=True)
    ids, none = torch.arange(6), torch.full((6,), -1)
    batch = Embeddings(z, ids, none, none, torch.stack([QUESTIONS, ANSWERS]))
    for row, others in ((0, [1, 2]), (3, [5]), (4, [5])):
        (slope,) = torch.autograd.grad(loss.double()(batch.select(ids[row : row + 1]), batch).loss_sum, z, retain_graph=True)
        assert not slope[1, others].any(), "a positive of an equal question"
        assert slope[1, [j for j in range(6) if j not in (row, *others)]].any(1).all(), "the others are negatives"


def test_with_the_question_as_label_all_answers_are_positives():
    z = torch.randn(2, 6, 5, dtype=torch.float64)
    ids, content = torch.arange(6), torch.stack([QUESTIONS, ANSWERS])
    batch = Embeddings(z, ids, QUESTIONS, ids, content)
    loss = InfoNCE().double()
    x, y = torch.nn.functional.normalize(z, dim=-1)
    log_p = (x[0] @ y.T / 0.05).log_softmax(0)
    torch.testing.assert_close(loss(batch.select(ids[:1]), batch).loss_sum, -log_p[:3].mean())


def test_the_learned_temperature_moves_and_is_bounded():
    loss = InfoNCE(learn_temperature=True)
    batch = rows(views=2, labels="none")
    loss(batch, batch).loss_sum.backward()
    assert loss.scale.grad is not None and float(loss.scale.grad) != 0
    with torch.no_grad():
        loss.scale.fill_(50.0)
    assert float(loss.temperature()) == pytest.approx(0.01)


@pytest.mark.parametrize("smoothing", [0.1, 0.9])
def test_a_smoothed_target_is_torchs(smoothing):
    batch = rows(views=3, labels="none", duplicates=False)
    loss = InfoNCE(label_smoothing=smoothing).double()
    z = torch.nn.functional.normalize(batch.z, dim=-1)
    scores = z[0] @ z[1:].flatten(0, 1).T / 0.05
    expected = torch.nn.functional.cross_entropy(scores, torch.arange(9), label_smoothing=smoothing, reduction="sum")
    torch.testing.assert_close(loss(batch, batch).loss_sum, expected)


@pytest.mark.parametrize("change", [{}, {"direction": "both"}, {"label_smoothing": 0.2}, {"hard_negative_weight": 1.0}])
@pytest.mark.parametrize("cuts", [[1], [3, 4], [0, 5]])
def test_keys_that_come_in_blocks_give_the_same(change, cuts):
    """A block may hold nothing, or nothing but what is left out."""
    loss, batch = InfoNCE(**change).double(), rows(views=3)

    def outcome(keys_of):
        z = batch.z.clone().requires_grad_()
        ready = loss.prepare(Embeddings(z, batch.example_id, batch.label, batch.position, batch.content_hash))
        terms = loss.combine(torch.stack([loss.block_statistics(ready, keys) for keys in keys_of(ready)]))
        return terms, *torch.autograd.grad(terms.loss_sum, z)

    whole, gradient = outcome(lambda ready: [ready])
    cut, got = outcome(lambda ready: [ready.select(part) for part in torch.arange(9).tensor_split(cuts) if len(part)])
    torch.testing.assert_close(cut.loss_sum, whole.loss_sum)
    torch.testing.assert_close(cut.stats["accuracy"], whole.stats["accuracy"])
    torch.testing.assert_close(got, gradient)


@pytest.mark.parametrize(
    "wrong", [{"temperature": 0}, {"similarity": "l2"}, {"direction": "back"}, {"label_smoothing": 1}, {"key_exchange": "mail"}]
)
def test_wrong_settings_name_their_parameter(wrong):
    with pytest.raises(InputError, match=f"^{next(iter(wrong))}="):
        InfoNCE(**wrong)
