"""Words as tokens: a vocabulary counted in the training rows, taken from word vectors, or both."""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tercet.contract import Source
from tercet.error import InputError
from tercet.model.vectors import read_vectors

UNKNOWN, PAD = "[UNK]", "[PAD]"
# Treebank's way with clitics ("do n't", "it 's"), which GloVe and SentEval's texts follow; else runs of letters or digits,
# and every other character alone.
WORD = r"\w+?(?=n['’]t\b)|n['’]t\b|['’](?:s|S|m|d|ll|re|ve)\b|\w+|[^\w\s]"


def vocabulary(
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
