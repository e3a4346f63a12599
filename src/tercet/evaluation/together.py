"""Several evaluators as one: what one has encoded, the next need not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tercet.contract import Encode, Evaluator
from tercet.error import InputError


class Remembered:
    """An ``encode`` that encodes each text once in its life."""

    def __init__(self, encode: Encode) -> None:
        self.encode = encode
        self.seen: dict[str, Tensor] = {}

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """``(N, D)``."""
        new = list(dict.fromkeys(text for text in texts if text not in self.seen))
        if new:
            self.seen.update(zip(new, self.encode(new), strict=True))
        return torch.stack([self.seen[text] for text in texts])


@dataclass(frozen=True)
class Together:
    """Runs all members and merges what they say."""

    members: Mapping[str, Evaluator]

    def __call__(self, encode: Encode) -> dict[str, float]:
        """Raises ``InputError`` where two members use one name."""
        remembered, metrics = Remembered(encode), {}
        for name, evaluator in self.members.items():
            found = evaluator(remembered)
            if twice := metrics.keys() & found.keys():
                raise InputError(f"evaluation.members.{name} measures {', '.join(sorted(twice))} once more. Rename it.")
            metrics |= found
        return metrics
