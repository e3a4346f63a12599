"""Word-level encoders (bag of words, GRU, LSTM) and pretrained word vectors."""

from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
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

from tercet.errors import InputError
from tercet.messages import warn_once
from tercet.paths import locate

ACCEPTED = "a text file with a word and its numbers on each line, or a folder with embeddings.safetensors and vocab.txt"


class WordVectors(NamedTuple):
    """``matrix (V, E)`` float32; row i belongs to ``words[i]``. No word is there twice."""

    words: list[str]
    matrix: Tensor


def read_vectors(path: str, key: str) -> WordVectors:
    """The vectors at ``path``, which may start under ``TERCET_DATA``.

    Raises:
        InputError: naming ``key``: there is no such file, or a line that is no word with E numbers.
    """
    try:
        return _read(path)
    except InputError as error:
        raise InputError(f"{key}={error}") from error


@lru_cache(maxsize=1)  # vocabulary and backbone ask for the same file
def _read(path: str) -> WordVectors:
    file = locate(path)
    if not file.exists():
        raise InputError(f"{path} does not exist. It takes {ACCEPTED}.")
    try:
        words, matrix = _folder(file, path) if file.is_dir() else _text(file, path)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error}). It takes {ACCEPTED}.") from error
    first = {word: row for row, word in reversed(list(enumerate(words)))}
    if len(first) < len(words):
        warn_once(f"{path}: {len(words) - len(first)} words come again; their first vector is kept.")
        rows = sorted(first.values())
        words, matrix = [words[row] for row in rows], matrix[rows]
    return WordVectors(words, matrix)


def _folder(folder: Path, place: str) -> tuple[list[str], Tensor]:
    for name in ("embeddings.safetensors", "vocab.txt"):
        if not (folder / name).is_file():
            raise InputError(f"{place} has no {name}. It takes {ACCEPTED}.")
    words = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
    words = words[:-1] if words[-1] == "" else words
    tensors = load_file(folder / "embeddings.safetensors")
    matrix = next(iter(tensors.values())).float()
    if len(tensors) != 1 or matrix.ndim != 2 or len(matrix) != len(words):
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in tensors.items())
        raise InputError(
            f"{place}: vocab.txt has {len(words)} words, embeddings.safetensors holds {shapes}; a row each is needed."
        )
    return words, matrix


def _text(file: Path, place: str) -> tuple[list[str], Tensor]:
    words: list[str] = []
    rows: list[np.ndarray] = []
    with file.open(encoding="utf-8", newline="\n") as lines:
        first = next(lines, "")
        if not first.strip():
            raise InputError(f"{place} is empty. It takes {ACCEPTED}.")
        head = first.split()
        header = len(head) == 2 and all(part.isdigit() for part in head)  # word2vec's: number of words and E
        size = int(head[1]) if header else len(head) - 1
        for number, line in enumerate(lines if header else chain([first], lines), start=2 if header else 1):
            parts = line.rstrip().rsplit(" ", size)  # from the right: a few of GloVe's words contain spaces
            values = _numbers(parts[1:])
            if len(parts) != size + 1 or size < 1 or values is None or not parts[0] or _goes_on(parts[0]):
                raise InputError(
                    f"{place}, line {number}: a word and {max(size, 1)} numbers are needed, as in the first line; "
                    f"it begins with {line.strip()[:30]!r}. Mend or delete the line."
                )
            words.append(parts[0])
            rows.append(values)
    if not rows:
        raise InputError(f"{place} has a header and no vectors. It takes {ACCEPTED}.")
    return words, torch.from_numpy(np.stack(rows))


def _goes_on(word: str) -> bool:
    """Whether a number was taken for the end of the word: there are too many on the line."""
    return " " in word and _numbers(word.rsplit(" ", 1)[1:]) is not None


def _numbers(parts: list[str]) -> np.ndarray | None:
    try:
        values = np.array(parts, dtype=np.float32)
    except ValueError:
        return None
    return values if np.isfinite(values).all() else None


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


def word_backbone(
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
        raise InputError("model.backbone.vectors: none of its words is in the vocabulary. Is model.tokenizer.lowercase right?")
    ids, rows = (torch.tensor(side) for side in zip(*pairs, strict=True))
    channels.fixed.weight.zero_()
    channels.fixed.weight[ids] = matrix[rows]
