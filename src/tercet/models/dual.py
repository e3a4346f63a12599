"""Two text encoders side by side: Quick-Thoughts' f and g."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tercet.errors import InputError
from tercet.models.encoder import Encoder
from tercet.models.engine.chunking import Execution
from tercet.models.text import TextEncoder
from tercet.rng import derive_seed
from tercet.types import Inputs, Item, TokenBatch
from tercet.views import TokenInfo


class DualEncoder(Encoder):
    """Two encoders without shared weights: ``TokenBatch -> (N, 2 D)``, the embeddings of ``f`` and ``g`` concatenated.

    Each has length 1 if its own ``normalize`` says so. ``tokenizer`` serves both; None is that of ``f``.

    >>> from tercet.models import word_backbone
    >>> from tercet.models.vocabulary import make_tokenizer
    >>> tokenizer = make_tokenizer(["a", "man", "plays"])
    >>> f, g = (TextEncoder(word_backbone(tokenizer, hidden_size=8), tokenizer, pooling="final") for _ in "fg")
    >>> DualEncoder(f, g).encode(["a man plays"]).shape
    torch.Size([1, 16])
    """

    kind = "towers"

    def __init__(self, f: TextEncoder, g: TextEncoder, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        tokenizer = f.tokenizer if tokenizer is None else tokenizer
        for name, part in (("f", f), ("g", g)):
            if part.tokenizer.get_vocab() != tokenizer.get_vocab():
                raise InputError(f"`{name}.tokenizer` is not `tokenizer`: both encoders read the same tokens.")
            if part.num_outputs != 1:
                raise InputError(f"`{name}.head.kind`={part.head.kind}: each encoder has one output. Use linear, mlp or none.")
        if f.dim != g.dim:
            raise InputError(f"`f` has {f.dim} columns, `g` {g.dim}: their product needs equally many.")
        super().__init__(f.execution)
        _share_fixed_vectors(f, g)
        self.f, self.g = f, g
        self.tokenizer = tokenizer

    def run(self, inputs: Inputs, execution: Execution) -> Tensor:
        """``TokenBatch -> (N, 2 D)``."""
        assert isinstance(inputs, TokenBatch)
        return torch.cat([self.f.run(inputs, execution), self.g.run(_with_other_seeds(inputs), execution)], -1)

    def prepare(self, items: Sequence[Item]) -> TokenBatch:
        """Token ids, cut at the ``max_length`` of ``f``."""
        return self.f.prepare(items)

    def settings(self) -> dict[str, Any]:
        """The settings of both."""
        return {"kind": self.kind, "f": self.f.settings(), "g": self.g.settings()}

    @property
    def dim(self) -> int:
        """2 D."""
        return self.f.dim + self.g.dim

    @property
    def num_outputs(self) -> int:
        """Two."""
        return 2

    @property
    def deterministic_dropout(self) -> bool:
        """Whether the dropout of ``f`` is deterministic; ``g`` has other masks."""
        return self.f.deterministic_dropout

    def describe_execution(self) -> str:
        """The layout and dropout of ``f``."""
        return self.f.describe_execution()

    def text_parts(self) -> list[TextEncoder]:
        """Both encoders."""
        return [self.f, self.g]

    def token_info(self) -> TokenInfo:
        """What views of texts need to know of the tokenizer."""
        return self.f.token_info()


def _with_other_seeds(inputs: TokenBatch) -> TokenBatch:
    """The same rows with other seeds of deterministic dropout."""
    seed = inputs.state.dropout_seed
    return inputs if seed is None else replace(inputs, state=replace(inputs.state, dropout_seed=derive_seed(seed, 1)))


def _share_fixed_vectors(f: TextEncoder, g: TextEncoder) -> None:
    """Keep one copy of equal pretrained word vectors, as in the authors' code: they are large and are not trained."""
    first, second = (getattr(getattr(part.backbone, "embeddings", None), "fixed", None) for part in (f, g))
    if first is not None and second is not None and torch.equal(first.weight, second.weight):
        second.weight = first.weight
