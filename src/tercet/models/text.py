"""Text encoders: backbone, pooling and head; two of them side by side."""

import inspect
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tercet.errors import require
from tercet.messages import warn_once
from tercet.models.encoder import Encoder, PoolingMixin
from tercet.models.engine import triton_kernels as kernels
from tercet.models.engine.backbone_runner import BackboneRunner
from tercet.models.engine.chunking import DEFAULT_EXECUTION, Execution
from tercet.models.engine.replay import Replay
from tercet.models.engine.transformers_compat import pooler_is_optional
from tercet.models.pooling import NEEDS_ALL_LAYERS, NEEDS_FIRST, POOLINGS, WORD_POOLINGS, Head
from tercet.models.pretrained import lowercases
from tercet.models.prompts import Prompts, prompt_length
from tercet.models.words import WordModel
from tercet.rng import derive_seed
from tercet.types import Item, TokenBatch
from tercet.views import TokenInfo

CONTINUES = "##"  # marks a continuation in WordPiece
BEGINS = ("Ġ", "▁", " ")  # mark the beginning of a word in byte-level BPE and SentencePiece


class TextEncoder(PoolingMixin, Encoder):
    """Encoder of texts by any text backbone of transformers, or a word-level one: ``TokenBatch -> (N, D)``.

    ``normalize`` scales embeddings to length 1. Texts are cut at ``max_length`` tokens, special ones included; None is the
    backbone's limit. ``compile`` runs its layers through torch.compile with dynamic shapes. ``prompt`` is put before each
    text; a list has one for each column of the training rows, and ``encode`` takes the first.

    >>> from tercet.models import make_tokenizer, random_backbone
    >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    >>> backbone = random_backbone({"model_type": "bert", "vocab_size": 8, **sizes})
    >>> encoder = TextEncoder(backbone, make_tokenizer(["a", "man", "plays"]), pooling="cls", head=Head("linear", 3))
    >>> encoder.encode(["a man plays", "a man"]).shape
    torch.Size([2, 3])
    """

    kind = "text"

    def __init__(
        self, backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pooling: str = "mean", head: Head | None = None,
        normalize: bool = False, max_length: int | None = None, execution: Execution = DEFAULT_EXECUTION, compile: bool = False,
        prompt: str | Sequence[str] | None = None,
    ) -> None:  # fmt: skip
        name, word_level = type(backbone).__name__, isinstance(backbone, WordModel)
        choose, choices = ("for a word-level encoder choose", WORD_POOLINGS) if word_level else ("choose", tuple(POOLINGS))
        require(pooling in choices, f"`pooling`={pooling}: {choose} one of {', '.join(choices)}.")
        has_pooler, is_recurrent = (getattr(backbone, part, None) is not None for part in ("pooler", "recurrent"))
        can_pool = has_pooler and not getattr(backbone, "lacks_pooler", False)
        require(pooling != "cls_pooler" or can_pool, f"`pooling`=cls_pooler: {name} has no pooler. Use `pooling`=cls.")
        require(pooling != "final" or is_recurrent, f"`pooling`=final: {name} is not recurrent. Use `pooling`=mean.")
        require(pooling != "sum" or word_level, "`pooling`=sum is for word-level encoders. Use `pooling`=mean.")
        pieces, words = max(tokenizer.get_vocab().values(), default=-1) + 1, backbone.config.vocab_size
        advice = "Use the model's own `tokenizer.name`, or a larger `backbone.config.vocab_size`."
        require(pieces <= words, f"The tokenizer has {pieces} pieces, the backbone's vocabulary only {words}. {advice}")
        if pooling != "cls_pooler" and has_pooler:
            backbone.pooler.requires_grad_(False)  # gets no gradient, for which DDP would wait
            if pooler_is_optional(backbone):
                backbone.pooler = None  # type: ignore[assignment]
        super().__init__(execution)
        self._set_parts(backbone, backbone.config.hidden_size, pooling, head, normalize)
        self.tokenizer: PreTrainedTokenizerBase = tokenizer
        self.word_level = word_level
        types = token_types(tokenizer, backbone)
        if types:  # for those who open a saved folder: transformers 5 returns XLNet's token types only where this asks for them
            names = ["input_ids", "token_type_ids", "attention_mask"]
            tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = names
        self.runner = BackboneRunner(backbone, int(tokenizer.pad_token_id or 0), compile, types)
        self.set_max_length(max_length)
        self.execution = self.runner.resolve(execution)
        self.prompts = Prompts.of(prompt)
        self.replay = Replay()

    @property
    def prompts(self) -> Prompts:
        """The prompts; setting them raises ``InputError`` where the pooling cannot leave out their tokens."""
        return self._prompts

    @prompts.setter
    def prompts(self, prompts: Prompts) -> None:
        out = not prompts.pooled and bool(prompts.text) and self.pooling != "last"  # no prompt stands there
        can = not out or self.pooling not in NEEDS_FIRST
        require(can, f"`pooling`={self.pooling} cannot leave out the tokens of a prompt. Use `pooling`=mean.")
        self._prompts, self.unpooled = prompts, prompt_length(self.tokenizer, prompts.text) if out else 0

    def pool(self, output: Any, mask: Tensor) -> Tensor:
        """Hidden states ``(n, L, H)`` and ``mask (n, L)`` to ``(n, D)``; a prompt that is not pooled does not count."""
        if self.unpooled:
            mask = mask * (torch.arange(mask.shape[1], device=mask.device) >= self.unpooled)
        return super().pool(output, mask)

    def set_max_length(self, max_length: int | None) -> None:
        """Cut texts at ``max_length`` tokens, or where the backbone's positions end; None is the limit of both parts."""
        limit, special = self.runner.max_tokens, self.tokenizer.num_special_tokens_to_add()
        least = f"`max_length`={max_length}: a whole number above {special}, which is how many special tokens a text has."
        require(max_length is None or (type(max_length) is int and max_length > special), least)
        if max_length is not None and max_length > limit:
            name = type(self.backbone).__name__
            warn_once(f"Texts are cut at {limit} tokens, not {max_length}: {name} has no more positions.")
        self.max_length = int(min(max_length or self.tokenizer.model_max_length, limit))

    def run(self, inputs: TokenBatch, execution: Execution) -> Tensor:
        """``TokenBatch -> (N, D)``."""
        options = (execution.layout == "packed", self.pooling in NEEDS_FIRST, self.pooling in NEEDS_ALL_LAYERS)

        def embed(rows: TokenBatch) -> Tensor:
            return self.pool(*self.runner(rows, *options))

        settings = (self.pooling, self.normalize, self.unpooled)
        replay = partial(self.replay, embed, self, self.runner.head_size, settings, execution.recompute)
        return execution.run(embed, inputs, replay if execution.can_replay and not self.runner.compiled else None)

    def prepare(self, items: Sequence[Item]) -> TokenBatch:
        """Token ids with special tokens and the prompt, cut at ``max_length``."""
        return tokenize(self.tokenizer, self.prompts.add(items), self.max_length)

    def settings(self) -> dict[str, Any]:
        """How embeddings are made, as plain values."""
        prompts = {"prompts": self.prompts.settings()} if self.prompts.texts else {}
        similarity = {"similarity": name} if (name := self.similarity_fn_name) != "cosine" else {}
        lower = {"lower_case": True} if lowercases(self.tokenizer) else {}  # its class does not keep that in a folder
        return {"kind": self.kind, **super().settings(), "max_length": self.max_length, **prompts, **similarity, **lower}

    def longest_seeded(self) -> float:
        """The longest rows in which dropout draws from seeds: all if chosen, and by default where torch's costs as much."""
        if self.runner.dropout_seeds is None or self.execution.dropout == "torch":
            return 0
        if self.execution.dropout == "deterministic" or self.device.type == "cpu":
            return math.inf
        return kernels.longest_available(self.device, self.runner.head_size)

    def describe_execution(self) -> str:
        """The layout and the dropout in use."""
        longest = self.longest_seeded()
        dropout = "by (seed, step, row)" if longest else "torch's"
        if 0 < longest < self.max_length:
            dropout += f", torch's in batches with rows of more than {longest} tokens"
        reason = {"sorted": self.runner.cannot_pack, "equal_length": self.runner.cannot_pad}.get(self.execution.layout)
        how = "run by equal length" if self.execution.layout == "equal_length" else self.execution.layout
        return f"rows are {how}{f' ({reason})' if reason else ''}, dropout is {dropout}"

    def token_info(self) -> TokenInfo:
        """What views of texts need to know of the tokenizer."""
        special = special_tokens(self.tokenizer)
        if self.tokenizer.unk_token_id is not None:
            special[self.tokenizer.unk_token_id] = False  # stands for a word of the text
        longest = min(self.runner.max_tokens, self.tokenizer.model_max_length)
        return TokenInfo(word_starts(self.tokenizer), special, self.tokenizer.mask_token_id, int(longest), self.tokenizer)


class DualEncoder(Encoder):
    """Two encoders without shared weights: ``TokenBatch -> (N, 2 D)``, the embeddings of ``f`` and ``g`` concatenated.

    Each has length 1 if its own ``normalize`` says so. ``tokenizer`` serves both; None is that of ``f``.

    >>> from tercet.models import make_tokenizer, word_backbone
    >>> tokenizer = make_tokenizer(["a", "man", "plays"])
    >>> f, g = (TextEncoder(word_backbone(tokenizer, hidden_size=8), tokenizer, pooling="final") for _ in "fg")
    >>> DualEncoder(f, g).encode(["a man plays"]).shape
    torch.Size([1, 16])
    """

    kind = "towers"
    num_outputs = 2

    def __init__(self, f: TextEncoder, g: TextEncoder, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        tokenizer = f.tokenizer if tokenizer is None else tokenizer
        for name, part in (("f", f), ("g", g)):
            same_tokens, kind = part.tokenizer.get_vocab() == tokenizer.get_vocab(), part.head.kind
            require(same_tokens, f"`{name}.tokenizer` is not `tokenizer`: both encoders read the same tokens.")
            require(part.num_outputs == 1, f"`{name}.head.kind`={kind}: each encoder has one output. Use linear, mlp or none.")
            prompted = any(part.prompts.texts.values())
            require(not prompted, f"`{name}.prompt`: two encoders take no prompts. Put them into the data.")
        require(f.dim == g.dim, f"`f` has {f.dim} columns, `g` {g.dim}: their product needs equally many.")
        super().__init__(f.execution)
        # One copy of equal pretrained word vectors, as in the authors' code: they are large and are not trained.
        first, second = (getattr(getattr(part.backbone, "embeddings", None), "fixed", None) for part in (f, g))
        if first is not None and second is not None and torch.equal(first.weight, second.weight):
            second.weight = first.weight
        self.f, self.g, self.tokenizer = f, g, tokenizer

    def run(self, inputs: TokenBatch, execution: Execution) -> Tensor:
        """``TokenBatch -> (N, 2 D)``; deterministic dropout has other masks in ``g``."""
        z, seed = self.f.run(inputs, execution), inputs.state.dropout_seed
        if seed is not None:
            inputs = replace(inputs, state=replace(inputs.state, dropout_seed=derive_seed(seed, 1)))
        return torch.cat([z, self.g.run(inputs, execution)], -1)

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

    def parts(self) -> list[PoolingMixin]:
        """Both encoders."""
        return [self.f, self.g]


def tokenize(tokenizer: PreTrainedTokenizerBase, items: Sequence[Item], max_length: int) -> TokenBatch:
    """Texts to ids with special tokens."""
    images = any(isinstance(item, bytes) for item in items)
    require(not images, "This model reads text, but was given images. Use a model of images, or texts.")
    ids = tokenizer(list(items), truncation=True, max_length=max_length, return_attention_mask=False)
    unknown = [tokenizer.unk_token_id or 0]  # for an empty text without special tokens
    return TokenBatch.from_lists([row or unknown for row in ids["input_ids"]])


def token_types(tokenizer: PreTrainedTokenizerBase, backbone: PreTrainedModel) -> dict[int, int] | None:
    """The token types of a text that are not 0, by token id (2 for XLNet's ``<cls>``); None if the backbone gets no types.

    ``InputError`` if the backbone takes something else from the tokenizer, as RoCBERT takes the shapes of characters.
    """
    accepted = inspect.signature(backbone.forward).parameters
    made = tokenizer("a b", return_token_type_ids=True)
    others = sorted((set(made) & set(accepted)) - {"input_ids", "attention_mask", "token_type_ids"})
    name = type(backbone).__name__
    require(not others, f"`tokenizer`: {name} takes {', '.join(others)} from it, which is not supported. Use another model.")
    if "token_type_ids" not in accepted or "token_type_ids" not in made:
        return None
    types = {token: number for token, number in zip(made["input_ids"], made["token_type_ids"], strict=True) if number}
    return types if types or "token_type_ids" in tokenizer.model_input_names else None


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
