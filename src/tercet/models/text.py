"""The text encoder: backbone, pooling and head."""

from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tercet.errors import InputError
from tercet.models.engine.backbone_runner import BackboneRunner, first_position
from tercet.models.engine.chunking import Execution
from tercet.models.pooling import NEEDS_ALL_LAYERS, NEEDS_FIRST, POOLINGS, WORD_POOLINGS, Head
from tercet.models.words import WordModel
from tercet.types import Inputs, Item, TokenBatch


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
        if isinstance(inputs, TokenBatch):
            self.execution = self.execution.resolve_auto_chunks(
                self, lambda rows: self.run(rows, self.execution.unchunked()), inputs
            )
        return self.run(inputs, self.execution)

    @abstractmethod
    def run(self, inputs: Inputs, execution: Execution) -> Tensor:
        """The same by another plan."""

    @abstractmethod
    def prepare(self, items: Sequence[Item]) -> Inputs:
        """What ``forward`` takes, of what is encoded outside training."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """How the vectors are made, as plain values."""

    @property
    def dim(self) -> int:
        """D."""
        return self.head.width(self.hidden) if self.head.active() else self.hidden

    @property
    def num_outputs(self) -> int:
        """How many vectors stand side by side in z: 2 where an encoder has Quick-Thoughts' f and g."""
        return self.head.num_outputs

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def deterministic_dropout(self) -> bool:
        """Whether dropout draws from seeds that travel with the tokens."""
        return False

    def describe_execution(self) -> str:
        """How rows are run, for a person."""
        return ""

    def has_dropout(self) -> bool:
        """Whether training draws any dropout: what makes two views of one text differ."""
        return any(isinstance(m, nn.Dropout) and m.p > 0 for m in self.modules())

    def pool(self, output: Any, mask: Tensor) -> Tensor:
        """Hidden states ``(n, L, H)`` and ``mask (n, L)`` to ``(n, D)``."""
        z: Tensor = self.head(POOLINGS[self.pooling](output, mask))
        return normalize_outputs(z, self.num_outputs) if self.normalize else z

    def shared_settings(self) -> dict[str, Any]:
        """The settings that all kinds share."""
        head = {"kind": self.head.kind, "dim": self.head.dim, "train_only": self.head.train_only}
        return {"kind": self.kind, "pooling": self.pooling, "head": head, "normalize": self.normalize}


def normalize_outputs(z: Tensor, sides: int) -> Tensor:
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
        self.max_length = max_length or max_row_length(backbone, tokenizer)
        self.reading = BackboneRunner(backbone, int(tokenizer.pad_token_id or 0), compile)
        self.execution = self.reading.resolve(execution)

    def run(self, inputs: Inputs, execution: Execution) -> Tensor:
        """``Ragged -> (N, D)``."""
        return execution.run(partial(self.embed, packed=execution.layout == "packed"), inputs)

    @property
    def deterministic_dropout(self) -> bool:
        """Where it is asked for, and on a CPU where it costs less than torch's."""
        chosen = self.execution.dropout == "deterministic" or (self.execution.dropout == "auto" and self.device.type == "cpu")
        return chosen and self.reading.dropout_seeds is not None

    def describe_execution(self) -> str:
        """Which layout and which dropout it is."""
        law = "by (seed, step, row)" if self.deterministic_dropout else "torch's"
        why = f" ({self.reading.why})" if self.reading.why and self.execution.layout == "sorted" else ""
        return f"rows are {self.execution.layout}{why}, dropout is {law} (model.execution)"

    def embed(self, rows: TokenBatch, packed: bool) -> Tensor:
        """``n`` rows to ``(n, D)``."""
        layers = self.pooling in NEEDS_ALL_LAYERS
        return self.pool(*self.reading(rows, packed, self.pooling in NEEDS_FIRST, layers))

    def prepare(self, items: Sequence[Item]) -> TokenBatch:
        """Token ids with special tokens, cut at ``max_length``."""
        return tokenize(self.tokenizer, items, self.max_length)

    def settings(self) -> dict[str, Any]:
        """How the vectors are made, as plain values."""
        return {**self.shared_settings(), "max_length": self.max_length}


def tokenize(tokenizer: PreTrainedTokenizerBase, items: Sequence[Item], max_length: int) -> TokenBatch:
    """Texts to ids with special tokens."""
    if any(isinstance(item, bytes) for item in items):
        raise InputError("This model reads text, but was given images. Use a model of images, or texts.")
    ids = tokenizer(list(items), truncation=True, max_length=max_length, return_attention_mask=False)
    unknown = [tokenizer.unk_token_id or 0]  # of an empty text without special tokens
    return TokenBatch.from_lists([row or unknown for row in ids["input_ids"]])


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


def max_row_length(backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """The longest row that the backbone takes."""
    positions = getattr(backbone.config, "max_position_embeddings", None) or 10**9
    positions -= first_position(backbone)
    return int(min(positions, tokenizer.model_max_length))


CONTINUES = "##"  # WordPiece marks continuations
BEGINS = ("Ġ", "▁", " ")  # byte-level BPE and SentencePiece mark beginnings


def word_starts(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """``(V,)`` true for pieces that begin a word; all of them where the tokenizer marks nothing."""
    pieces = [str(tokenizer.convert_ids_to_tokens(i)) for i in range(len(tokenizer))]
    if any(piece.startswith(CONTINUES) for piece in pieces if piece != CONTINUES):
        return torch.tensor([not piece.startswith(CONTINUES) for piece in pieces])
    begins = torch.tensor([piece.startswith(BEGINS) for piece in pieces])
    # A mark on a handful of pieces is no convention: those of a vocabulary of whole words are plain.
    return begins | special_tokens(tokenizer) if begins.float().mean() > 0.05 else torch.ones(len(pieces), dtype=torch.bool)


def token_info(encoder: Encoder) -> tuple[Tensor, Tensor, int | None, int] | None:
    """What views of texts need: ``begins_word``, ``special``, the mask's id if there is one, and the longest row."""
    from tercet.models.dual import DualEncoder

    if isinstance(encoder, DualEncoder):
        return token_info(encoder.f)
    if not isinstance(encoder, TextEncoder):
        return None
    tokenizer = encoder.tokenizer
    fixed = special_tokens(tokenizer)
    if tokenizer.unk_token_id is not None:
        fixed[tokenizer.unk_token_id] = False  # stands for a word of the text
    return word_starts(tokenizer), fixed, tokenizer.mask_token_id, max_row_length(encoder.backbone, tokenizer)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """``(V,)`` true for special tokens."""
    out = torch.zeros(len(tokenizer), dtype=torch.bool)
    out[sorted(set(tokenizer.all_special_ids))] = True
    return out
