"""Word-level encoders (bag of words, GRU, LSTM) and pretrained word vectors."""

import re
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tercet.errors import InputError, check_choice, refuse_damaged, require
from tercet.messages import warn_once
from tercet.models.engine.transformers_compat import initialize_uniform
from tercet.paths import locate

CELLS: dict[str, type[nn.GRU] | type[nn.LSTM] | None] = {"gru": nn.GRU, "lstm": nn.LSTM, "bag": None}
ACCEPTED = "a text file with a word and its numbers on each line, or a folder with embeddings.safetensors and vocab.txt"


class WordVectors(NamedTuple):
    """``matrix (vocabulary, E)`` float32; row i belongs to ``words[i]``, and words are distinct."""

    words: list[str]
    matrix: Tensor


@lru_cache(maxsize=1)  # the tokenizer and the backbone read the same file
def read_vectors(path: str, parameter: str = "path") -> WordVectors:
    """Read pretrained word vectors: GloVe's or word2vec's text format, or a folder. ``InputError`` names ``parameter``."""
    file, name = locate(path), f"`{parameter}`={path}"
    require(file.exists(), f"{name} does not exist. It takes {ACCEPTED}.")
    with refuse_damaged(name, advice=f"It takes {ACCEPTED}."):
        words, matrix = _read_folder(file, name) if file.is_dir() else _read_text(file, name)
    first = {word: row for row, word in reversed(list(enumerate(words)))}
    if len(first) < len(words):
        warn_once(f"{path}: {len(words) - len(first)} words occur more than once; their first vector is used.")
        rows = sorted(first.values())
        words, matrix = [words[row] for row in rows], matrix[rows]
    return WordVectors(words, matrix)


def _read_folder(folder: Path, name: str) -> tuple[list[str], Tensor]:
    for file in ("embeddings.safetensors", "vocab.txt"):
        require((folder / file).is_file(), f"{name} has no {file}. It takes {ACCEPTED}.")
    words = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
    words = words[:-1] if words[-1] == "" else words
    tensors = load_file(folder / "embeddings.safetensors")
    matrix = next(iter(tensors.values()), torch.empty(0)).float()
    fits = len(tensors) == 1 and matrix.ndim == 2 and len(matrix) == len(words) and matrix.numel()
    held = ", ".join(f"{key} {tuple(value.shape)}" for key, value in tensors.items())
    require(fits, f"{name}: vocab.txt has {len(words)} words, embeddings.safetensors holds {held}; a row each is needed.")
    require(matrix.isfinite().all(), f"{name}: embeddings.safetensors holds numbers that are not finite.")
    return words, matrix


def _read_text(file: Path, name: str) -> tuple[list[str], Tensor]:
    words: list[str] = []
    rows: list[np.ndarray] = []
    with file.open(encoding="utf-8", newline="\n") as lines:
        first = next(lines, "")
        head = first.split()
        require(head, f"{name} is empty. It takes {ACCEPTED}.")
        # word2vec has a header: the number of words and E
        has_header = len(head) == 2 and all(re.fullmatch("[0-9]{1,9}", part) for part in head)
        size = int(head[1]) if has_header else len(head) - 1
        for number, line in enumerate(lines if has_header else chain([first], lines), start=2 if has_header else 1):
            word, *parts = line.rstrip().rsplit(" ", size)  # from the right: a few of GloVe's words contain spaces
            values = _parse_numbers(parts)
            too_many = " " in word and _parse_numbers(word.rsplit(" ", 1)[1:]) is not None  # a number at the word's end
            if len(parts) != size or size < 1 or values is None or not word or too_many:
                needed = f"a word and {max(size, 1)} numbers are needed, as in the first line"
                raise InputError(f"{name}, line {number}: {needed}; correct or delete it: {line.strip()[:30]!r}")
            words.append(word)
            rows.append(values)
    require(rows, f"{name} has a header and no vectors. It takes {ACCEPTED}.")
    return words, torch.from_numpy(np.stack(rows))


def _parse_numbers(parts: list[str]) -> np.ndarray | None:
    """The numbers as float32; None if one is not a finite number."""
    try:
        values = np.array(parts, dtype=np.float32)
    except ValueError:
        return None
    return values if np.isfinite(values).all() else None


class WordConfig(PreTrainedConfig):
    """The first ``trained_words`` ids have learned vectors of ``trained_dim`` columns; all have ``fixed_dim`` fixed ones."""

    model_type = "tercet_words"
    vocab_size: int = 2
    cell: str = "gru"
    hidden_size: int = 2
    bidirectional: bool = False
    trained_words: int = 2
    trained_dim: int = 2
    fixed_dim: int = 0
    dropout: float = 0.0


class WordEmbeddings(nn.Module):
    """``ids (n, L) -> (n, L, E)``: learned vectors (beyond ``trained_words`` the unknown word's), pretrained ones, or both."""

    def __init__(self, config: WordConfig) -> None:
        super().__init__()
        self.words = config.trained_words
        self.trained = nn.Embedding(config.trained_words, config.trained_dim) if config.trained_dim else None
        # A parameter, not a buffer: DDP sends buffers to every process at every step.
        self.fixed = nn.Embedding(config.vocab_size, config.fixed_dim) if config.fixed_dim else None
        if self.fixed is not None:
            self.fixed.weight.requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        """``(n, L) -> (n, L, E)``."""
        parts = [] if self.trained is None else [self.trained(ids.masked_fill(ids >= self.words, 0))]
        parts += [] if self.fixed is None else [self.fixed(ids)]
        return torch.cat(parts, -1)

    @torch.no_grad()
    def set_fixed(self, tokenizer: PreTrainedTokenizerBase, vectors: WordVectors) -> None:
        """Copy pretrained vectors; words without one get zeros."""
        assert self.fixed is not None
        ids = tokenizer.get_vocab()
        pairs = [(ids[word], row) for row, word in enumerate(vectors.words) if word in ids]
        require(pairs, "`vectors`: none of its words is in the vocabulary. Does its case agree with the `tokenizer`?")
        targets, rows = (torch.tensor(column) for column in zip(*pairs, strict=True))
        self.fixed.weight.zero_()
        self.fixed.weight[targets] = vectors.matrix[rows]


class WordModel(PreTrainedModel):
    """Word vectors, then a GRU or LSTM of one layer, or nothing (``bag``): Quick-Thoughts' encoders (arXiv:1803.02893).

    ``last_hidden_state (n, L, H)``; ``pooler_output (n, H)``: the final state of both directions (H/2 each), None for a bag.
    """

    config_class = WordConfig
    main_input_name = "input_ids"
    config: WordConfig

    def __init__(self, config: WordConfig) -> None:
        super().__init__(config)
        self.embeddings = WordEmbeddings(config)
        self.dropout = nn.Dropout(config.dropout)
        cell, width = CELLS[config.cell], config.trained_dim + config.fixed_dim
        size = config.hidden_size // (2 if config.bidirectional else 1)
        self.recurrent = cell(width, size, batch_first=True, bidirectional=config.bidirectional) if cell else None
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):  # transformers calls this for modules that hold weights themselves
            initialize_uniform(module.weight, -0.1, 0.1)  # as in the authors' code

    def get_input_embeddings(self) -> nn.Module:
        """The word vectors."""
        return self.embeddings

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, inputs_embeds: Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> BaseModelOutputWithPooling:  # fmt: skip
        """``ids (n, L)`` (or their embeddings) and ``mask (n, L)``, padded on the right; padding has no influence."""
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


def word_backbone(
    tokenizer: PreTrainedTokenizerBase, cell: str = "gru", hidden_size: int | None = 1200, bidirectional: bool = False,
    trained_dim: int = 620, vectors: str | None = None, dropout: float = 0.0,
) -> WordModel:  # fmt: skip
    """Make a word-level backbone for the words of ``tokenizer``; the defaults are Quick-Thoughts' (arXiv:1803.02893).

    ``cell`` is gru, lstm or bag (no recurrence). Word vectors have ``trained_dim`` learned columns (0 is none) and those of
    the file ``vectors``, which stay fixed (None is none; zeros for a word that it lacks). ``hidden_size`` is the width of
    the state, both directions together; None for a bag.

    >>> from tercet.models import make_tokenizer
    >>> word_backbone(make_tokenizer(["a", "man"]), hidden_size=8, trained_dim=4).config.trained_words
    4
    """
    check_choice("cell", cell, list(CELLS))
    require(0 <= dropout < 1, f"`dropout`={dropout}: a rate from 0 to below 1.")
    has_vectors = trained_dim > 0 or (trained_dim == 0 and vectors is not None)
    require(has_vectors, f"`trained_dim`={trained_dim}: above 0, or 0 with pretrained vectors (`vectors`).")
    stateless = hidden_size is None and not bidirectional
    require(cell != "bag" or stateless, "`cell`=bag has no state: use `hidden_size`=null `bidirectional`=false.")
    accepted = "an even number, half for each direction" if bidirectional else "a whole number above 0"
    possible = hidden_size is not None and hidden_size >= 1 and not (bidirectional and hidden_size % 2)
    require(cell == "bag" or possible, f"`hidden_size`={hidden_size}: {accepted}.")
    fixed = read_vectors(vectors, "vectors") if vectors else None
    fixed_dim = fixed.matrix.shape[1] if fixed else 0
    counted = tokenizer.init_kwargs.get("counted") or 0
    config = WordConfig(
        vocab_size=len(tokenizer), cell=cell, hidden_size=hidden_size or trained_dim + fixed_dim,
        bidirectional=bidirectional, trained_words=counted + 2 if counted else len(tokenizer), trained_dim=trained_dim,
        fixed_dim=fixed_dim, dropout=dropout,
    )  # fmt: skip
    model = WordModel(config)
    if fixed is not None:
        model.embeddings.set_fixed(tokenizer, fixed)
    return model
