"""Stateless random numbers."""

import pytest
import torch

from tercet import rng
from tercet.rng import derive_seed


@pytest.mark.parametrize("number", [0, 1, 7, 1 << 40, (1 << 63) - 2, -3])
def test_a_number_is_the_same_as_a_tensor(number):
    seed = torch.randint(-(1 << 62), 1 << 62, (100,))
    assert torch.equal(derive_seed(seed, number), derive_seed(seed, torch.tensor(number)))
    assert len(derive_seed(seed, number).unique()) == 100


@pytest.mark.parametrize("number", [3, -1, torch.tensor(5), torch.arange(4), torch.arange(4, dtype=torch.int32)])
@pytest.mark.parametrize("shape", [(1,), (7, 1), (1, 1), (0, 4), (7, 4)])
def test_a_cpu_draws_the_numbers_of_a_device(shape, number, monkeypatch):
    seed = torch.randint(-(1 << 63), (1 << 63) - 1, shape)
    other = seed.mT.contiguous().mT if seed.ndim > 1 else seed  # in another order of memory
    found = [derive_seed(x, number) for x in (seed, other)]
    monkeypatch.setattr(rng, "runs_on_cpu", lambda device: False)
    want = derive_seed(seed, number)
    for got in found:
        assert got.dtype == want.dtype and torch.equal(got, want)
        assert got.is_contiguous()
    assert found[0].view(torch.int16).shape[:-1] == want.shape[:-1]  # as dropout does


def test_splitmix64_has_its_published_numbers():
    """The first outputs of the reference implementation for the seed 1234567."""
    want = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert [int(x) % (1 << 64) for x in derive_seed(torch.tensor(1234567), torch.arange(5))] == want


def test_single_numbers_overflow_without_a_warning(recwarn):
    for number in (7, torch.tensor(7)):
        assert int(derive_seed(torch.tensor(-5), number)) == int(derive_seed(torch.full((3,), -5), number)[0])
    assert not recwarn.list
