"""Stateless random numbers."""

import pytest
import torch

from tercet.rng import derive_seed


@pytest.mark.parametrize("number", [0, 1, 7, 1 << 40, (1 << 63) - 2, -3])
def test_a_number_is_the_same_as_a_tensor(number):
    seed = torch.randint(-(1 << 62), 1 << 62, (100,))
    assert torch.equal(derive_seed(seed, number), derive_seed(seed, torch.tensor(number)))
    assert len(derive_seed(seed, number).unique()) == 100
