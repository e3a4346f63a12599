"""The text encoder: backbone, pooling and head."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tercet.errors import InputError
from tercet.models.encoder import Encoder, PoolingMixin
from tercet.models.engine.backbone_runner import BackboneRunner, first_position
from tercet.models.engine.chunking import DEFAULT_EXECUTION, Execution
from tercet.models.engine.packing import layer_stack
from tercet.models.pooling import NEEDS_ALL_LAYERS, NEEDS_FIRST, POOLINGS, WORD_POOLINGS, Head
from tercet.models.words import WordModel
from tercet.types import Inputs, Item, TokenBatch
from tercet.views import TokenInfo


class TextEncoder(PoolingMixin, Encoder):
    """Encoder of texts by any text backbone of transformers, or a word-level one: ``TokenBatch -> (N, D)``.

    ``normalize`` scales embeddings to length 1. ``max_length`` is where texts are cut, special tokens included; None is
    the backbone's limit. ``compile`` runs the backbone through torch.compile with dynamic shapes. Padding and its removal
    happen inside, as ``execution`` says.

    >>> from tercet.models import random_backbone
    >>> from tercet.models.vocabulary import make_tokenizer
    >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    >>> backbone = random_backbone({"model_type": "bert", "vocab_size": 8, **sizes})
    >>> encoder = TextEncoder(backbone, make_tokenizer(["a", "man", "plays"]), pooling="cls", head=Head("linear", 3))
    >>> encoder.encode(["a man plays", "a man"]).shape
    torch.Size([2, 3])
    """

    kind = "text"

    def __init__(
        self,
        backbone: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        pooling: str = "mean",
        head: Head | None = None,
        normalize: bool = False,
        max_length: int | None = None,
        execution: Execution = DEFAULT_EXECUTION,
        compile: bool = False,
    ) -> None:
        words = backbone.config.vocab_size
        _check_pooling(backbone, pooling)
        if len(tokenizer) > words:
            raise InputError(
                f"The tokenizer has {len(tokenizer)} pieces, the backbone's vocabulary only {words}. "
                "Use the model's own `tokenizer.name`, or a larger `backbone.config.vocab_size`."
            )
        if pooling != "cls_pooler" and hasattr(backbone, "pooler"):
            backbone.pooler = None  # type: ignore[assignment]  # gets no gradient, for which DDP would wait
        super().__init__(execution)
        self._set_parts(backbone, backbone.config.hidden_size, pooling, head, normalize)
        self.tokenizer = tokenizer
        self.max_length = max_length or max_row_length(backbone, tokenizer)
        self.runner = BackboneRunner(backbone, int(tokenizer.pad_token_id or 0), compile)
        self.execution = self.runner.resolve(execution)

    def run(self, inputs: Inputs, execution: Execution) -> Tensor:
        """``TokenBatch -> (N, D)``."""
        return execution.run(partial(self.embed, packed=execution.layout == "packed"), inputs)

    def embed(self, rows: TokenBatch, packed: bool) -> Tensor:
        """``n`` rows to ``(n, D)`` in one pass."""
        return self.pool(*self.runner(rows, packed, self.pooling in NEEDS_FIRST, self.pooling in NEEDS_ALL_LAYERS))

    def prepare(self, items: Sequence[Item]) -> TokenBatch:
        """Token ids with special tokens, cut at ``max_length``."""
        return tokenize(self.tokenizer, items, self.max_length)

    def settings(self) -> dict[str, Any]:
        """How embeddings are made, as plain values."""
        return {**self.shared_settings(), "max_length": self.max_length}

    @property
    def deterministic_dropout(self) -> bool:
        """Whether dropout draws from seeds: where it is chosen, and by default on a CPU, where it costs less than torch's."""
        chosen = self.execution.dropout == "deterministic" or (self.execution.dropout == "auto" and self.device.type == "cpu")
        return chosen and self.runner.dropout_seeds is not None

    def describe_execution(self) -> str:
        """The layout and the dropout in use."""
        dropout = "by (seed, step, row)" if self.deterministic_dropout else "torch's"
        why = f" ({self.runner.cannot_pack})" if self.runner.cannot_pack and self.execution.layout == "sorted" else ""
        return f"rows are {self.execution.layout}{why}, dropout is {dropout}"

    def text_parts(self) -> "list[TextEncoder]":
        """Itself."""
        return [self]

    def token_info(self) -> TokenInfo:
        """What views of texts need to know of the tokenizer."""
        special = special_tokens(self.tokenizer)
        if self.tokenizer.unk_token_id is not None:
            special[self.tokenizer.unk_token_id] = False  # stands for a word of the text
        longest = max_row_length(self.backbone, self.tokenizer)
        return TokenInfo(word_starts(self.tokenizer), special, self.tokenizer.mask_token_id, longest)

    def layer_stack(self) -> nn.ModuleList | None:
        """The backbone's stack of layers."""
        return layer_stack(self.backbone)


def tokenize(tokenizer: PreTrainedTokenizerBase, items: Sequence[Item], max_length: int) -> TokenBatch:
    """Texts to ids with special tokens."""
    if any(isinstance(item, bytes) for item in items):
        raise InputError("This model reads text, but was given images. Use a model of images, or texts.")
    ids = tokenizer(list(items), truncation=True, max_length=max_length, return_attention_mask=False)
    unknown = [tokenizer.unk_token_id or 0]  # for an empty text without special tokens
    return TokenBatch.from_lists([row or unknown for row in ids["input_ids"]])


def _check_pooling(backbone: PreTrainedModel, pooling: str) -> None:
    name, word_level = type(backbone).__name__, isinstance(backbone, WordModel)
    if pooling not in POOLINGS:
        raise InputError(f"`pooling`={pooling}: choose one of {', '.join(POOLINGS)}.")
    if pooling == "cls_pooler" and getattr(backbone, "pooler", None) is None:
        raise InputError(f"`pooling`=cls_pooler: {name} has no pooler. Use `pooling`=cls.")
    if pooling == "final" and getattr(backbone, "recurrent", None) is None:
        raise InputError(f"`pooling`=final: {name} is not recurrent. Use `pooling`=mean.")
    if pooling == "sum" and not word_level:
        raise InputError("`pooling`=sum is for word-level encoders. Use `pooling`=mean.")
    if word_level and pooling not in WORD_POOLINGS:
        raise InputError(f"`pooling`={pooling}: for a word-level encoder choose one of {', '.join(WORD_POOLINGS)}.")


def max_row_length(backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """The most tokens of a row that the backbone takes."""
    positions = getattr(backbone.config, "max_position_embeddings", None) or 10**9
    positions -= first_position(backbone)
    return int(min(positions, tokenizer.model_max_length))


CONTINUES = "##"  # marks a continuation in WordPiece
BEGINS = ("Ġ", "▁", " ")  # mark the beginning of a word in byte-level BPE and SentencePiece


def word_starts(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """``(vocabulary,)`` true for pieces that begin a word; all true if the tokenizer marks nothing."""
    pieces = [str(tokenizer.convert_ids_to_tokens(i)) for i in range(len(tokenizer))]
    if any(piece.startswith(CONTINUES) for piece in pieces if piece != CONTINUES):
        return torch.tensor([not piece.startswith(CONTINUES) for piece in pieces])
    begins = torch.tensor([piece.startswith(BEGINS) for piece in pieces])
    # A mark on a handful of pieces is no convention: those of a vocabulary of whole words are plain.
    return begins | special_tokens(tokenizer) if begins.float().mean() > 0.05 else torch.ones(len(pieces), dtype=torch.bool)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """``(vocabulary,)`` true for special tokens."""
    out = torch.zeros(len(tokenizer), dtype=torch.bool)
    out[sorted(set(tokenizer.all_special_ids))] = True
    return out
