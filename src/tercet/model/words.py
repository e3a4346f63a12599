"""Encoders of words: a bag of them, or a recurrent network over them; the backbones of Quick-Thoughts."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers import (
    AutoConfig,
    AutoModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    initialization,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tercet.error import InputError
from tercet.model.vectors import read_vectors

CELLS: dict[str, type[nn.GRU] | type[nn.LSTM] | None] = {"gru": nn.GRU, "lstm": nn.LSTM, "bag": None}


class WordConfig(PreTrainedConfig):
    """``trained_words`` ids have rows of ``trained_dim`` that are learned; ``fixed_dim`` is that of pretrained rows."""

    model_type = "tercet_words"

    def __init__(
        self,
        vocab_size: int = 2,
        cell: str = "gru",
        hidden_size: int = 2,
        bidirectional: bool = False,
        trained_words: int = 2,
        trained_dim: int = 2,
        fixed_dim: int = 0,
        dropout: float = 0.0,
        **others: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.cell = cell
        self.hidden_size = hidden_size
        self.bidirectional = bidirectional
        self.trained_words = trained_words
        self.trained_dim = trained_dim
        self.fixed_dim = fixed_dim
        self.dropout = dropout
        super().__init__(**others)


class Channels(nn.Module):
    """``ids (n, L) -> (n, L, E)``: learned rows, pretrained rows, or both side by side (multi-channel).

    A word beyond ``trained_words`` has no learned row and takes that of the unknown word.
    """

    def __init__(self, config: WordConfig) -> None:
        super().__init__()
        self.words = config.trained_words
        self.trained = nn.Embedding(config.trained_words, config.trained_dim) if config.trained_dim else None
        # A parameter and no buffer: DDP sends buffers to every process at every step.
        self.fixed = nn.Embedding(config.vocab_size, config.fixed_dim) if config.fixed_dim else None
        if self.fixed is not None:
            self.fixed.weight.requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        """``(n, L) -> (n, L, E)``."""
        parts = [] if self.trained is None else [self.trained(ids.masked_fill(ids >= self.words, 0))]
        parts += [] if self.fixed is None else [self.fixed(ids)]
        return torch.cat(parts, -1)


class WordModel(PreTrainedModel):
    """Words, then a GRU or LSTM of one layer, or nothing (``bag``).

    ``last_hidden_state (n, L, H)``; ``pooler_output (n, H)`` is the final state, of both directions side by side (H/2
    each), none for a bag. Quick-Thoughts' encoders (Logeswaran and Lee 2018, arXiv:1803.02893).
    """

    config_class = WordConfig
    main_input_name = "input_ids"
    config: WordConfig

    def __init__(self, config: WordConfig) -> None:
        super().__init__(config)
        self.embeddings = Channels(config)
        self.dropout = nn.Dropout(config.dropout)
        kind = CELLS[config.cell]
        width = config.trained_dim + config.fixed_dim
        size = config.hidden_size // (2 if config.bidirectional else 1)
        self.recurrent = kind(width, size, batch_first=True, bidirectional=config.bidirectional) if kind else None
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):  # transformers visits modules that hold weights themselves, no others
            initialization.uniform_(module.weight, -0.1, 0.1)  # the authors'

    def get_input_embeddings(self) -> nn.Module:
        """Both channels."""
        return self.embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> BaseModelOutputWithPooling:
        """``ids (n, L)`` (or their embeddings) and ``mask (n, L)``, padded on the right; rows never see the padding."""
        x = self.dropout(self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds)
        if self.recurrent is None:
            return BaseModelOutputWithPooling(last_hidden_state=x)
        assert attention_mask is not None
        rows = pack_padded_sequence(x, attention_mask.sum(1).cpu(), batch_first=True, enforce_sorted=False)
        states, final = self.recurrent(rows)
        final = final[0] if isinstance(final, tuple) else final
        hidden, _ = pad_packed_sequence(states, batch_first=True, total_length=x.shape[1])
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=torch.cat(list(final), -1))


AutoConfig.register(WordConfig.model_type, WordConfig)
AutoModel.register(WordConfig, WordModel)


def words(
    tokenizer: PreTrainedTokenizerBase,
    cell: str,
    hidden_size: int | None,
    bidirectional: bool,
    trained_dim: int,
    vectors: str | None,
    dropout: float,
) -> WordModel:
    """A backbone over the words of ``tokenizer``.

    ``trained_dim`` columns are learned (0: none), those of the file ``vectors`` stay as they are (null: none; a word
    that it lacks is 0). ``hidden_size`` is the width of the state, both directions together; null for a bag.

    Raises:
        InputError: a size that cannot be.
    """
    if cell not in CELLS:
        raise InputError(f"model.backbone.cell={cell}: choose one of {', '.join(CELLS)}.")
    if not 0 <= dropout < 1:
        raise InputError(f"model.backbone.dropout={dropout}: a rate from 0 to below 1.")
    if trained_dim < 0 or (trained_dim == 0 and vectors is None):
        raise InputError(
            f"model.backbone.trained_dim={trained_dim}: above 0, or 0 with pretrained vectors (model.backbone.vectors)."
        )
    if cell == "bag" and (hidden_size is not None or bidirectional):
        raise InputError("model.backbone.cell=bag has no state: use hidden_size=null bidirectional=false.")
    if cell != "bag" and (not hidden_size or hidden_size < 1 or (bidirectional and hidden_size % 2)):
        even = "an even number, half for each direction" if bidirectional else "a whole number above 0"
        raise InputError(f"model.backbone.hidden_size={hidden_size}: {even}.")
    fixed = read_vectors(vectors, "model.backbone.vectors") if vectors else None
    fixed_dim = fixed.matrix.shape[1] if fixed else 0
    counted = tokenizer.init_kwargs.get("counted") or 0
    config = WordConfig(
        vocab_size=len(tokenizer), cell=cell, hidden_size=hidden_size or trained_dim + fixed_dim,
        bidirectional=bidirectional, trained_words=counted + 2 if counted else len(tokenizer), trained_dim=trained_dim,
        fixed_dim=fixed_dim, dropout=dropout,
    )  # fmt: skip
    model = WordModel(config)
    if fixed is not None:
        fill(model.embeddings, tokenizer, fixed.words, fixed.matrix)
    return model


@torch.no_grad()
def fill(channels: Channels, tokenizer: PreTrainedTokenizerBase, known: list[str], matrix: Tensor) -> None:
    """Write pretrained rows into the fixed channel."""
    assert channels.fixed is not None
    place = tokenizer.get_vocab()
    pairs = [(place[word], row) for row, word in enumerate(known) if word in place]
    if not pairs:
        raise InputError(
            "model.backbone.vectors: none of its words is in the vocabulary. Is model.tokenizer.lowercase right?"
        )
    ids, rows = (torch.tensor(side) for side in zip(*pairs, strict=True))
    channels.fixed.weight.zero_()
    channels.fixed.weight[ids] = matrix[rows]
