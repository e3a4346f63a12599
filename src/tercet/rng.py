"""Stateless random numbers, functions of a seed and a number: the same in any process, chunk and order."""

import numpy as np
import torch
from torch import Tensor

from tercet.types import runs_on_cpu

# The constants of SplitMix64, as signed 64-bit numbers: torch has no arithmetic on unsigned ones.
GOLDEN, FIRST, SECOND = (x - (1 << 64) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_GOLDEN, _FIRST, _SECOND = (np.uint64(x % (1 << 64)) for x in (GOLDEN, FIRST, SECOND))  # for numpy, which has it

BITS = 1 << 16  # a draw of dropout has 16 bits: a rate is rounded to a multiple of 1/65536


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)  # filled with zeros, as for unsigned numbers


def derive_seed(seed: Tensor, number: Tensor | int) -> Tensor:
    """Derive a new seed from a seed and a number, elementwise: a step of SplitMix64 (Steele, Lea and Flood 2014)."""
    if type(seed) is Tensor and runs_on_cpu(seed.device) and seed.numel():  # numpy's empty arrays have other strides
        return _derive_on_cpu(seed, number)
    if isinstance(number, int):  # as a tensor it would be copied to the device, for which the host waits
        x = seed + ((GOLDEN * (number + 1) + (1 << 63)) % (1 << 64) - (1 << 63))
    else:
        x = seed + GOLDEN * (number.to(seed.device, torch.long) + 1)
    x.bitwise_xor_(_shift_right(x, 30)).mul_(FIRST)
    x.bitwise_xor_(_shift_right(x, 27)).mul_(SECOND)
    return x.bitwise_xor_(_shift_right(x, 31))


def _derive_on_cpu(seed: Tensor, number: Tensor | int) -> Tensor:
    """The same by numpy, in two thirds of the time: it has unsigned numbers, and multiplies them faster."""
    number = number if isinstance(number, Tensor) else torch.tensor(number)
    with np.errstate(over="ignore"):  # of single numbers; others overflow without a warning
        step = (number.to("cpu", torch.long).numpy().view(np.uint64) + np.uint64(1)) * _GOLDEN
        x = np.asarray(np.add(seed.numpy().view(np.uint64), step, order="C"))
        x ^= x >> np.uint64(30)
        x *= _FIRST
        x ^= x >> np.uint64(27)
        x *= _SECOND
        x ^= x >> np.uint64(31)
    return torch.from_numpy(x.view(np.int64))


def uniform(seed: Tensor, number: Tensor | int) -> Tensor:
    """A number in [0, 1), float32, for each seed and number.

    >>> import torch
    >>> float(uniform(torch.tensor(0), 0)) == float(uniform(torch.tensor(0), 0)) < 1
    True
    """
    return _shift_right(derive_seed(seed, number), 40).float() / (1 << 24)
