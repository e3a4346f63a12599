"""Word vocabularies, and their expansion with pretrained vectors."""

import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tercet.errors import InputError, require
from tercet.models.encoder import Encoder
from tercet.models.pooling import Head
from tercet.models.text import DualEncoder, TextEncoder
from tercet.models.words import WordModel, WordVectors, read_vectors
from tercet.types import Source

UNKNOWN, PAD = "[UNK]", "[PAD]"
# Clitics are split as in the Penn Treebank ("do n't", "it 's"), which GloVe and SentEval's texts follow; otherwise a word is
# a run of letters or digits, or any other single character.
WORD = r"\w+?(?=n['’]t\b)|n['’]t\b|['’](?:s|S|m|d|ll|re|ve)\b|\w+|[^\w\s]"
_counted: dict[tuple[Any, ...], tuple[str, ...]] = {}


def word_tokenizer(
    source: Source | None, size: int = 20_000, minimum: int = 5, lowercase: bool = False, vectors: str | None = None
) -> PreTrainedTokenizerFast:
    """Make a word-level tokenizer; ids 0 and 1 are the unknown word and padding.

    The ``size`` most frequent words of the text columns of ``source`` that occur at least ``minimum`` times come first,
    then the words of the file ``vectors``, which training need not have seen. Either may be None.

    >>> from datasets import Dataset
    >>> from types import SimpleNamespace
    >>> rows = Dataset.from_dict({"text": ["A man plays.", "A man sleeps."]})
    >>> source = SimpleNamespace(columns=["text"], rows=lambda: rows, fingerprint=lambda: "two texts")
    >>> tokenizer = word_tokenizer(source, minimum=2)
    >>> tokenizer.convert_ids_to_tokens(tokenizer("A man eats.")["input_ids"])
    ['A', 'man', '[UNK]', '.']
    """
    require(source is not None or vectors is not None, "`source` is null: then the words come from `vectors`; name a file.")
    require(size >= 1 and minimum >= 1, f"`size`={size}, `minimum`={minimum}: 1 or more.")
    words = list(_frequent_words(source, size, minimum, lowercase)) if source is not None else []
    counted = len(words)
    require(counted or source is None, f"`minimum`={minimum}: no word occurs so often. Use a smaller number.")
    if vectors is not None:
        words += read_vectors(vectors, "vectors").words
    tokenizer = make_tokenizer(words, lowercase)
    tokenizer.init_kwargs["counted"] = counted
    return tokenizer


def make_tokenizer(words: list[str], lowercase: bool = False) -> PreTrainedTokenizerFast:
    """A word-level tokenizer with these words, whose ids start at 2.

    >>> make_tokenizer(["a", "man"])("a man eats")["input_ids"]
    [2, 3, 0]
    """
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([UNKNOWN, PAD, *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), *([normalizers.Lowercase()] if lowercase else [])])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), "removed", invert=True)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=UNKNOWN, pad_token=PAD)


def _frequent_words(source: Source, size: int, minimum: int, lowercase: bool) -> tuple[str, ...]:
    """The words, most frequent first; counted once in a process for equal rows."""
    key = (*source.columns, source.fingerprint(), size, minimum, lowercase)
    if key not in _counted:
        tokenizer = make_tokenizer([], lowercase).backend_tokenizer
        trainer = trainers.WordLevelTrainer(vocab_size=size, min_frequency=minimum, special_tokens=[], show_progress=False)
        batches = source.rows().iter(batch_size=1000)
        tokenizer.train_from_iterator((batch[column] for batch in batches for column in source.columns), trainer)
        ids = tokenizer.get_vocab(with_added_tokens=False)
        _counted[key] = tuple(sorted((word for word in ids if word not in (UNKNOWN, PAD)), key=ids.__getitem__))
    return _counted[key]


@dataclass(frozen=True)
class Expansion:
    """Statistics: ``shared`` words that the map was fitted on, ``new`` words, and the R² of the ``fit`` of each table."""

    shared: int
    new: int
    fit: tuple[float, ...]


def expand_vocabulary(encoder: Encoder, vectors: WordVectors) -> tuple[Encoder, Expansion]:
    """Give the encoder a learned vector for each word of ``vectors`` that its tokenizer keeps in one piece.

    For each table E of learned vectors the map is argmin over A, b of sum over shared words of ||A v + b - E[w]||^2,
    without a penalty (Quick-Thoughts, section 4.1 and the authors' code; Kiros et al. 2015, arXiv:1506.06726, section
    2.2). Words of the training vocabulary keep their vectors; words with "_" (phrases) are left out. ``InputError`` if the
    encoder learns no word vectors, or shares fewer words with ``vectors`` than a map needs.
    """
    parts = encoder.text_parts()
    learns = parts and all(part.word_level for part in parts)
    require(learns, "This model learns no word vectors: only a word-level one does (GRU, LSTM, bag of words).")
    made, shared, new, fits = zip(*(_expand(part, vectors) for part in parts), strict=True)
    return DualEncoder(*made) if len(made) == 2 else made[0], Expansion(shared[-1], new[-1], fits)


def _expand(part: TextEncoder, vectors: WordVectors) -> tuple[TextEncoder, int, int, float]:
    """The expanded encoder, the number of shared and new words, and the fit."""
    backbone, ids = cast(WordModel, part.backbone), part.tokenizer.get_vocab()
    table = backbone.embeddings.trained
    if table is None:
        raise InputError("This model's word vectors are all pretrained; there is nothing to map to.")
    words, size = backbone.config.trained_words, vectors.matrix.shape[1]
    row = {word: i for i, word in enumerate(vectors.words) if _keeps_whole(part.tokenizer, word)}
    shared = [word for word in row if 2 <= ids.get(word, words) < words]
    few = f"`vectors`: {len(shared)} of their words are in the model's vocabulary; a map of {size} columns needs more."
    require(len(shared) > size, f"{few} Is it the right file, and does its case agree with the model's tokenizer?")
    source, target = vectors.matrix[[row[w] for w in shared]], table.weight.detach()[[ids[w] for w in shared]].cpu()
    x = pad(source.double(), (0, 1), value=1)  # the last row of the weights is the constant
    solution = torch.linalg.lstsq(x, target.double()).solution
    residual = (x @ solution - target).square().sum()
    fit = float(1 - residual / (target - target.mean(0)).square().sum())  # R²
    ordered = sorted(ids, key=ids.__getitem__)
    new = [word for word in row if ids.get(word, words) >= words]
    rest = [word for word in ordered[words:] if word not in row]
    mapped = pad(vectors.matrix[[row[w] for w in new]], (0, 1), value=1) @ solution.float()
    expanded = _with_words(part, [*ordered[:words], *new, *rest], torch.cat([table.weight.detach().cpu(), mapped]))
    return expanded, len(shared), len(new), fit


def _keeps_whole(tokenizer: PreTrainedTokenizerBase, word: str) -> bool:
    """Whether the tokenizer leaves the word unchanged: in one piece, with the same case."""
    backend = tokenizer.backend_tokenizer
    if "_" in word or word in (UNKNOWN, PAD) or backend.normalizer.normalize_str(word) != word:
        return False
    return [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(word)] == [word]


def _with_words(part: TextEncoder, words: list[str], table: Tensor) -> TextEncoder:
    """The same encoder with other words, of which the first two stay, and another table of learned vectors."""
    before, replaced = part.tokenizer.get_vocab(), copy.deepcopy(part.tokenizer.backend_tokenizer)
    replaced.model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=replaced, unk_token=UNKNOWN, pad_token=PAD)
    backbone: Any = part.backbone  # a WordModel
    values = {**backbone.config.to_dict(), "vocab_size": len(tokenizer), "trained_words": len(table)}
    new = WordModel(type(backbone.config).from_dict(values))
    weights = {**backbone.state_dict(), "embeddings.trained.weight": table}
    if backbone.embeddings.fixed is not None:  # zero for a word without a pretrained vector, as before
        fixed = torch.zeros(len(tokenizer), new.config.fixed_dim)
        pairs = [(i, before[word]) for word, i in tokenizer.get_vocab().items() if word in before]
        ids, rows = torch.tensor(pairs).unbind(1)
        fixed[ids] = backbone.embeddings.fixed.weight.detach().cpu()[rows]
        weights["embeddings.fixed.weight"] = fixed
    new.load_state_dict(weights)
    made = TextEncoder(new, tokenizer, part.pooling, Head(**part.head.settings()), part.normalize, part.max_length)
    made.head.load_state_dict(part.head.state_dict())
    return made
