"""Word vocabularies, and their expansion with pretrained vectors."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tercet.errors import InputError
from tercet.models.dual import DualEncoder
from tercet.models.folder import build_encoder, dual_encoder
from tercet.models.text import Encoder, TextEncoder
from tercet.models.words import WordModel, WordVectors, read_vectors
from tercet.types import Source

UNKNOWN, PAD = "[UNK]", "[PAD]"
# Treebank's way with clitics ("do n't", "it 's"), which GloVe and SentEval's texts follow; else runs of letters or digits,
# and every other character alone.
WORD = r"\w+?(?=n['’]t\b)|n['’]t\b|['’](?:s|S|m|d|ll|re|ve)\b|\w+|[^\w\s]"


def word_tokenizer(
    source: Source | None, size: int, minimum: int, lowercase: bool, vectors: str | None
) -> PreTrainedTokenizerFast:
    """A tokenizer of words; ids 0 and 1 are the unknown word and padding.

    The ``size`` most frequent words of the text columns of ``source`` that occur ``minimum`` times come first, then the
    words of the file ``vectors``, which training need not have seen. Either may be null.

    Raises:
        InputError: there is neither, or no word is left.
    """
    if source is None and vectors is None:
        raise InputError("model.tokenizer: with source=null the words come from model.tokenizer.vectors; name a file.")
    if size < 1 or minimum < 1:
        raise InputError(f"model.tokenizer.size={size}, minimum={minimum}: 1 or more.")
    words = list(_counted(_Key(source), size, minimum, lowercase)) if source is not None else []
    if source is not None and not words:
        raise InputError(f"model.tokenizer.minimum={minimum}: no word occurs so often. Use a smaller number.")
    counted = len(words)
    if vectors is not None:
        words += read_vectors(vectors, "model.tokenizer.vectors").words
    made = tokenizer_of(list(dict.fromkeys(words)), lowercase)
    made.init_kwargs["counted"] = counted
    return made


def tokenizer_of(words: list[str], lowercase: bool) -> PreTrainedTokenizerFast:
    """The tokenizer whose id 2 is the first of the words."""
    known = {word: i for i, word in enumerate(dict.fromkeys([UNKNOWN, PAD, *words]))}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token=UNKNOWN))
    steps: list[Any] = [normalizers.NFC(), *([normalizers.Lowercase()] if lowercase else [])]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), "removed", invert=True)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=UNKNOWN, pad_token=PAD)


class _Key:
    """A source that equals another of the same rows, so that they are counted once in a process."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.name = (*source.columns, source.fingerprint())

    def __hash__(self) -> int:
        return hash(self.name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.name == other.name


@lru_cache(maxsize=4)
def _counted(key: _Key, size: int, minimum: int, lowercase: bool) -> tuple[str, ...]:
    tokenizer = tokenizer_of([], lowercase).backend_tokenizer
    trainer = trainers.WordLevelTrainer(vocab_size=size, min_frequency=minimum, special_tokens=[], show_progress=False)
    tokenizer.train_from_iterator(_texts(key.source), trainer)
    ids = tokenizer.get_vocab(with_added_tokens=False)
    return tuple(sorted((word for word in ids if word not in (UNKNOWN, PAD)), key=ids.__getitem__))


def _texts(source: Source) -> Iterator[list[str]]:
    rows = source.rows()
    for batch in rows.iter(batch_size=1000):
        for column in source.columns:
            yield batch[column]


@dataclass(frozen=True)
class Expansion:
    """What was done: ``shared`` words the map was fitted on, ``new`` words it gave a vector, ``fit`` its R² per table."""

    shared: int
    new: int
    fit: tuple[float, ...]


def expand_vocabulary(encoder: Encoder, vectors: WordVectors) -> tuple[Encoder, Expansion]:
    """The encoder with a learned vector for each word of ``vectors`` that its tokenizer can tell.

    For each table E of learned vectors the map is argmin over A, b of sum over shared words of ||A v + b - E[w]||^2,
    without a penalty (Quick-Thoughts, section 4.1 and the authors' code; Kiros et al. 2015, arXiv:1506.06726, section
    2.2). Words of the training vocabulary keep their vectors; words with "_" (phrases) are left out.

    Raises:
        InputError: the encoder learns no word vectors, or shares fewer words with ``vectors`` than a map needs.
    """
    parts = [encoder.f, encoder.g] if isinstance(encoder, DualEncoder) else [encoder]
    made, fits = [], []
    for part in parts:
        if not isinstance(part, TextEncoder) or not isinstance(part.backbone, WordModel):
            raise InputError("expand: this model learns no word vectors. Use a run of model=gru, towers or bag.")
        found, shared, new, fit = _expanded(part, vectors)
        made.append(found)
        fits.append(fit)
    return dual_encoder(*made) if len(made) == 2 else made[0], Expansion(shared, new, tuple(fits))


def _expanded(part: TextEncoder, vectors: WordVectors) -> tuple[TextEncoder, int, int, float]:
    backbone, place = part.backbone, part.tokenizer.get_vocab()
    assert isinstance(backbone, WordModel)
    old = backbone.embeddings.trained
    if old is None:
        raise InputError("expand: this model's word vectors are all pretrained; there is nothing to map to.")
    words = backbone.config.trained_words
    known = _whole(part.tokenizer, vectors.words)
    row = {word: i for i, word in enumerate(vectors.words) if known[i]}
    shared = [word for word in row if 2 <= place.get(word, words) < words]
    size = vectors.matrix.shape[1]
    if len(shared) <= size:
        raise InputError(
            f"vectors: {len(shared)} of their words are in the model's vocabulary; a map of {size} columns needs more "
            "than that. Is it the right file, and does its case agree with model.tokenizer.lowercase?"
        )
    source, target = vectors.matrix[[row[w] for w in shared]], old.weight.detach()[[place[w] for w in shared]].cpu()
    weight, fit = _map(source, target)
    ordered = sorted(place, key=place.__getitem__)
    learned = ordered[:words]
    has = set(learned)
    new = [word for word in row if word not in has]
    rest = [word for word in ordered[words:] if word not in row]
    mapped = _with_ones(vectors.matrix[[row[w] for w in new]]) @ weight
    tokenizer = _renamed(part.tokenizer, [*learned, *new, *rest])
    return _made(part, tokenizer, torch.cat([old.weight.detach().cpu(), mapped]), place), len(shared), len(new), fit


def _with_ones(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_ones(len(x), 1)], 1)


def _map(source: Tensor, target: Tensor) -> tuple[Tensor, float]:
    """``(E + 1, D)`` weights, the last row the constant; R² on what they were fitted to."""
    x = _with_ones(source.double())
    weight = torch.linalg.lstsq(x, target.double()).solution
    left = (x @ weight - target).square().sum()
    return weight.float(), float(1 - left / (target - target.mean(0)).square().sum())


def _whole(tokenizer: PreTrainedTokenizerBase, words: list[str]) -> list[bool]:
    """Which words the tokenizer would leave as they are: one piece, its case kept."""
    backend = tokenizer.backend_tokenizer

    def whole(word: str) -> bool:
        if "_" in word or word in (UNKNOWN, PAD) or backend.normalizer.normalize_str(word) != word:
            return False
        return [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(word)] == [word]

    return [whole(word) for word in words]


def _renamed(tokenizer: PreTrainedTokenizerBase, words: list[str]) -> PreTrainedTokenizerFast:
    """The same tokenizer with other words; the first two stay."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    spec["model"]["vocab"] = {word: i for i, word in enumerate(words)}
    made = Tokenizer.from_str(json.dumps(spec))
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token=UNKNOWN, pad_token=PAD)


def _made(part: TextEncoder, tokenizer: PreTrainedTokenizerFast, table: Tensor, before: dict[str, int]) -> TextEncoder:
    backbone = part.backbone
    assert isinstance(backbone, WordModel)
    config = type(backbone.config).from_dict(
        {**backbone.config.to_dict(), "vocab_size": len(tokenizer), "trained_words": len(table)}
    )
    new = WordModel(config)
    weights = backbone.state_dict()
    weights["embeddings.trained.weight"] = table
    if backbone.embeddings.fixed is not None:  # a word that its file lacks is 0 there, as before
        fixed = torch.zeros(len(tokenizer), config.fixed_dim)
        pairs = [(i, before[word]) for word, i in tokenizer.get_vocab().items() if word in before]
        ids, rows = torch.tensor(pairs).unbind(1)
        fixed[ids] = backbone.embeddings.fixed.weight.detach().cpu()[rows]
        weights["embeddings.fixed.weight"] = fixed
    new.load_state_dict(weights)
    made = build_encoder(new, tokenizer, part.settings())
    assert isinstance(made, TextEncoder)
    made.head.load_state_dict(part.head.state_dict())
    return made
