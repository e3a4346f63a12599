"""Backbone, pooling, head: what every encoder is, and the one that reads text."""

from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tercet.contract import Inputs, Item, Ragged
from tercet.error import InputError
from tercet.model.changed import first_place
from tercet.model.execution import Execution
from tercet.model.head import Head
from tercet.model.pooling import NEEDS_ALL_LAYERS, NEEDS_FIRST, POOLINGS, WORD_POOLINGS
from tercet.model.reading import Reading
from tercet.model.words import WordModel


class Encoder(nn.Module):
    """``Inputs -> (N, D)``: ``hidden`` is the backbone's width H; ``normalize`` puts z on the unit sphere."""

    kind: str

    def __init__(
        self,
        backbone: PreTrainedModel,
        hidden: int,
        pooling: str,
        head: Head,
        normalize: bool,
        execution: Execution,
    ) -> None:
        super().__init__()
        head.build(hidden, getattr(backbone.config, "initializer_range", 0.02))
        # transformers hands out pretrained models in evaluation mode, and Lightning keeps what it finds: without this
        # line a pretrained encoder would train without dropout, and two dropout views would be one.
        self.backbone = backbone.train()
        self.hidden = hidden
        self.pooling = pooling
        self.head = head
        self.normalize = normalize
        self.execution = execution

    def forward(self, inputs: Inputs) -> Tensor:
        """``(N, D)``, in the order of the rows."""
        if isinstance(inputs, Ragged):
            self.execution = self.execution.fitted(self, lambda rows: self.run(rows, self.execution.whole()), inputs)
        return self.run(inputs, self.execution)

    @abstractmethod
    def run(self, inputs: Inputs, execution: Execution) -> Tensor:
        """The same by another plan."""

    @abstractmethod
    def inputs(self, items: Sequence[Item]) -> Inputs:
        """What ``forward`` takes, of what is encoded outside training."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """How the vectors are made, as plain values."""

    @property
    def dim(self) -> int:
        """D."""
        return self.head.width(self.hidden) if self.head.active() else self.hidden

    @property
    def sides(self) -> int:
        """How many vectors stand side by side in z: 2 where an encoder has Quick-Thoughts' f and g."""
        return self.head.sides

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def keyed(self) -> bool:
        """Whether dropout draws from seeds that travel with the tokens."""
        return False

    def plan(self) -> str:
        """How rows are run, for a person."""
        return ""

    def drops(self) -> bool:
        """Whether training draws any dropout: what makes two views of one text differ."""
        return any(isinstance(m, nn.Dropout) and m.p > 0 for m in self.modules())

    def finish(self, output: Any, mask: Tensor) -> Tensor:
        """Hidden states ``(n, L, H)`` and ``mask (n, L)`` to ``(n, D)``."""
        z: Tensor = self.head(POOLINGS[self.pooling](output, mask))
        return unit(z, self.sides) if self.normalize else z

    def described(self) -> dict[str, Any]:
        """The settings that all kinds share."""
        head = {"kind": self.head.kind, "dim": self.head.dim, "train_only": self.head.train_only}
        return {"kind": self.kind, "pooling": self.pooling, "head": head, "normalize": self.normalize}


def unit(z: Tensor, sides: int) -> Tensor:
    """Each side of each row to length 1."""
    return nn.functional.normalize(z.unflatten(-1, (sides, -1)), dim=-1).flatten(-2)


class TextEncoder(Encoder):
    """``Ragged -> (N, D)``; how padding comes and goes is decided in here.

    ``max_length`` cuts what ``inputs`` is given, special tokens included; null is the backbone's limit. ``compile`` runs
    the backbone through torch.compile with dynamic shapes.
    """

    kind = "text"

    def __init__(
        self,
        backbone: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        pooling: str,
        head: Head,
        normalize: bool,
        max_length: int | None,
        execution: Execution,
        compile: bool = False,
    ) -> None:
        if pooling not in POOLINGS:
            raise InputError(f"model.pooling={pooling}: choose one of {', '.join(POOLINGS)}.")
        words = backbone.config.vocab_size
        if len(tokenizer) > words:
            raise InputError(
                f"The tokenizer has {len(tokenizer)} pieces, the backbone's vocabulary only {words}. "
                "Use the model's own model.tokenizer.name, or a larger model.backbone.config.vocab_size."
            )
        _check_pooling(backbone, pooling)
        if pooling != "cls_pooler" and hasattr(backbone, "pooler"):
            backbone.pooler = None  # type: ignore[assignment]  # trained by nobody; DDP would wait for it
        super().__init__(backbone, backbone.config.hidden_size, pooling, head, normalize, execution)
        self.tokenizer = tokenizer
        self.max_length = max_length or limit(backbone, tokenizer)
        self.reading = Reading(backbone, int(tokenizer.pad_token_id or 0), compile)
        self.execution = self.reading.settle(execution)

    def run(self, inputs: Inputs, execution: Execution) -> Tensor:
        """``Ragged -> (N, D)``."""
        return execution.run(partial(self.embed, packed=execution.layout == "packed"), inputs)

    @property
    def keyed(self) -> bool:
        """Where it is asked for, and on a CPU where it costs less than torch's."""
        chosen = self.execution.dropout == "keyed" or (self.execution.dropout == "auto" and self.device.type == "cpu")
        return chosen and self.reading.noise is not None

    def plan(self) -> str:
        """Which layout and which dropout it is."""
        law = "by (seed, step, row)" if self.keyed else "torch's"
        why = f" ({self.reading.why})" if self.reading.why and self.execution.layout == "sorted" else ""
        return f"rows are {self.execution.layout}{why}, dropout is {law} (model.execution)"

    def embed(self, rows: Ragged, packed: bool) -> Tensor:
        """``n`` rows to ``(n, D)``."""
        layers = self.pooling in NEEDS_ALL_LAYERS
        return self.finish(*self.reading(rows, packed, self.pooling in NEEDS_FIRST, layers))

    def inputs(self, items: Sequence[Item]) -> Ragged:
        """Token ids with special tokens, cut at ``max_length``."""
        return tokenized(self.tokenizer, items, self.max_length)

    def settings(self) -> dict[str, Any]:
        """How the vectors are made, as plain values."""
        return {**self.described(), "max_length": self.max_length}


def tokenized(tokenizer: PreTrainedTokenizerBase, items: Sequence[Item], max_length: int) -> Ragged:
    """Texts to ids with special tokens."""
    if any(isinstance(item, bytes) for item in items):
        raise InputError("This model reads text, but was given images. Use a model of images, or texts.")
    ids = tokenizer(list(items), truncation=True, max_length=max_length, return_attention_mask=False)
    unknown = [tokenizer.unk_token_id or 0]  # of an empty text without special tokens
    return Ragged.of([row or unknown for row in ids["input_ids"]])


def _check_pooling(backbone: PreTrainedModel, pooling: str) -> None:
    name, recurrent = type(backbone).__name__, getattr(backbone, "recurrent", None) is not None
    if pooling == "cls_pooler" and getattr(backbone, "pooler", None) is None:
        raise InputError(f"model.pooling=cls_pooler: {name} has no pooler. Use model.pooling=cls.")
    if pooling == "final" and not recurrent:
        raise InputError(f"model.pooling=final: {name} is not recurrent. Use model.pooling=mean.")
    if pooling == "sum" and not isinstance(backbone, WordModel):
        raise InputError("model.pooling=sum is for encoders of words. Use model.pooling=mean.")
    if isinstance(backbone, WordModel) and pooling not in WORD_POOLINGS:
        raise InputError(f"model.pooling={pooling}: for an encoder of words choose one of {', '.join(WORD_POOLINGS)}.")


def limit(backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """The longest row that the backbone takes."""
    positions = getattr(backbone.config, "max_position_embeddings", None) or 10**9
    positions -= first_place(backbone)
    return int(min(positions, tokenizer.model_max_length))
