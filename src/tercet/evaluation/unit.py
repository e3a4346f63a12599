"""Embeddings on the unit sphere."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from tercet.contract import Encode, Item
from tercet.error import InputError


def unit(encode: Encode, items: Sequence[Item], name: str) -> Tensor:
    """``(N, D)`` float64, each row of length 1, or 0 where the model gave zeros.

    Raises:
        InputError: an embedding is not finite; every comparison with it would be false, and look like a result.
    """
    z = encode(items).double()
    if bad := int((~z.isfinite()).any(1).sum()):
        raise InputError(
            f"{name}: {bad} of {len(z)} embeddings are not finite (NaN or infinite). The model has diverged, or overflows "
            "in half precision: use another checkpoint or 32-bit precision."
        )
    return F.normalize(z, dim=-1)
