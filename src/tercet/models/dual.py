"""Two encoders side by side: Quick-Thoughts' f and g."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from tercet.errors import InputError
from tercet.models.engine.chunking import Execution
from tercet.models.text import Encoder, TextEncoder
from tercet.rng import derive_seed
from tercet.types import Item, TokenBatch


class DualEncoder(Encoder):
    """``Ragged -> (N, 2 D)``: the vectors of ``f`` and of ``g``, which share no weights, one after the other.

    Each is on the unit sphere if its own ``normalize`` says so. ``tokenizer`` is for both.
    """

    kind = "towers"

    def __init__(self, f: TextEncoder, g: TextEncoder, tokenizer: PreTrainedTokenizerBase) -> None:
        nn.Module.__init__(self)
        for name, tower in (("f", f), ("g", g)):
            if tower.tokenizer.get_vocab() != tokenizer.get_vocab():
                raise InputError(f"model.{name}.tokenizer is not model.tokenizer: both towers read the same tokens.")
            if tower.num_outputs != 1:
                raise InputError(f"model.{name}.head.kind={tower.head.kind}: a tower is one side. Use linear, mlp or none.")
        if f.dim != g.dim:
            raise InputError(f"model.f has {f.dim} columns, model.g {g.dim}: their product needs equally many.")
        _share(f, g)
        self.f, self.g = f, g
        self.tokenizer = tokenizer
        self.execution = f.execution

    def run(self, inputs: Any, execution: Execution) -> Tensor:
        """``Ragged -> (N, 2 D)``."""
        return torch.cat([self.f.run(inputs, execution), self.g.run(_apart(inputs), execution)], -1)

    @property
    def deterministic_dropout(self) -> bool:
        """Whether ``f``'s dropout is; ``g``'s draws others."""
        return self.f.deterministic_dropout

    def describe_execution(self) -> str:
        """``f``'s."""
        return self.f.describe_execution()

    def prepare(self, items: Sequence[Item]) -> TokenBatch:
        """Token ids, as ``f`` reads them."""
        return self.f.prepare(items)

    @property
    def dim(self) -> int:
        """2 D."""
        return self.f.dim + self.g.dim

    @property
    def num_outputs(self) -> int:
        """Two."""
        return 2

    def settings(self) -> dict[str, Any]:
        """Those of both."""
        return {"kind": self.kind, "f": self.f.settings(), "g": self.g.settings()}


def _apart(inputs: TokenBatch) -> TokenBatch:
    """The same rows whose dropout draws other numbers."""
    seed = inputs.state.dropout_seed
    return inputs if seed is None else replace(inputs, state=replace(inputs.state, dropout_seed=derive_seed(seed, 1)))


def _share(f: TextEncoder, g: TextEncoder) -> None:
    """One table of pretrained word vectors, as the authors have: it is large, and nothing is learned in it."""
    first, second = (getattr(getattr(tower.backbone, "embeddings", None), "fixed", None) for tower in (f, g))
    if first is not None and second is not None and torch.equal(first.weight, second.weight):
        second.weight = first.weight
