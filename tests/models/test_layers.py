"""Layers that replace torch's: the same values and gradients."""

import copy
import pickle

import pytest
import torch
from torch import nn

from tercet.models.engine import layers
from tercet.models.engine.layers import ReusingEmbedding, replace_layers

WORDS, SIZE = 11, 4


def pair(**options):
    """An embedding of torch, and the same one replaced."""
    torch.manual_seed(0)
    plain = nn.Embedding(WORDS, SIZE, **options)
    replaced = nn.Sequential(copy.deepcopy(plain))
    replace_layers(replaced)
    return plain, replaced[0]


def memory(gradient):
    return gradient.untyped_storage().data_ptr()


def backward(module, ids, seed=0):
    out = module(ids)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("options", [{}, {"padding_idx": 3}, {"padding_idx": -1}])
@pytest.mark.parametrize("shape", [(60,), (5, 12), (1, 0), ()])
def test_gradients_are_those_of_torch_bit_for_bit(shape, options):
    plain, replaced = pair(**options)
    assert type(replaced) is ReusingEmbedding
    for step in range(3):  # the second and third use the memory of the first
        ids = torch.randint(WORDS, shape, generator=torch.Generator().manual_seed(step))
        for module in (plain, replaced):
            module.zero_grad()
            backward(module, ids, step)
        assert torch.equal(plain(ids), replaced(ids))
        assert torch.equal(plain.weight.grad, replaced.weight.grad)


def test_gradients_of_several_passes_add_up():
    plain, replaced = pair()
    for _ in range(2):
        for module in (plain, replaced):
            module.zero_grad()
            for number in range(5):
                backward(module, torch.arange(number, number + 6), number)
            (module(torch.arange(7)).square().sum() + module(torch.arange(3)).sum() + module.weight.sum()).backward()
        assert torch.equal(plain.weight.grad, replaced.weight.grad)


def test_a_gradient_is_written_to_the_memory_of_the_last_one():
    _, replaced = pair()
    places = set()
    for step in range(4):
        replaced.zero_grad()
        backward(replaced, torch.arange(5), step)
        places.add(memory(replaced.weight.grad))
    assert len(places) == 1
    for _ in range(4):  # of two passes each
        replaced.zero_grad()
        for chunk in range(2):
            backward(replaced, torch.arange(5), chunk)
        assert len(replaced.memory.free) == 1


def test_large_gradients_are_freed(monkeypatch):
    monkeypatch.setattr(layers, "KEPT", 4 * WORDS * SIZE - 1)
    _, replaced = pair()
    backward(replaced, torch.arange(5))
    replaced.zero_grad()
    assert not replaced.memory.free


def test_a_gradient_that_is_still_used_is_not_overwritten():
    _, replaced = pair()
    kept = []
    for step in range(4):
        replaced.zero_grad()
        backward(replaced, torch.arange(step, step + 5), step)
        gradient = replaced.weight.grad
        kept.append((gradient[2:4] if step % 2 else gradient.numpy(), gradient.clone()))
        del gradient
    for step, (part, whole) in enumerate(kept):
        assert torch.equal(torch.as_tensor(part), whole[2:4] if step % 2 else whole)


def test_a_gradient_can_be_differentiated():
    found = []
    for module in pair():
        weight = module.weight
        (slope,) = torch.autograd.grad(module(torch.tensor([1, 2, 2])).pow(3).sum(), weight, create_graph=True)
        found.append([slope, *torch.autograd.grad(slope.square().sum(), weight)])
    for a, b in zip(*found, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b)


def test_copies_have_memory_of_their_own():
    plain, replaced = pair()
    backward(replaced, torch.arange(5))
    for twin in (copy.deepcopy(replaced), pickle.loads(pickle.dumps(replaced))):
        twin.zero_grad()
        backward(twin, torch.arange(5))
        assert torch.equal(twin.weight.grad, replaced.weight.grad)
        assert memory(twin.weight.grad) != memory(replaced.weight.grad)
    assert list(replaced.state_dict()) == list(plain.state_dict())


def test_what_has_no_such_gradient_is_as_in_torch():
    ids = torch.tensor([1, 1, 3])
    for options in ({"sparse": True}, {"scale_grad_by_freq": True}, {"max_norm": 1.0}):
        assert type(pair(**options)[1]) is nn.Embedding
    _, replaced = pair()
    for change in (lambda x: x.double(), lambda x: x.bfloat16(), lambda x: x.requires_grad_(False)):
        other = change(copy.deepcopy(replaced))
        out = other(ids)
        assert torch.equal(out, other.weight[ids])
        if out.requires_grad:
            out.sum().backward()
            assert other.weight.grad.dtype == other.weight.dtype
    replaced.weight = nn.Parameter(torch.randn(WORDS + 2, SIZE))  # after memory of the former shape has been kept
    backward(replaced, ids)
    replaced.zero_grad()
    replaced.weight = nn.Parameter(torch.randn(WORDS, SIZE))
    backward(replaced, ids)
    assert replaced.weight.grad.shape == (WORDS, SIZE)
