"""Words that training has not seen: their vectors by a linear map from larger, pretrained ones."""

import json
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tercet.error import InputError
from tercet.model.encoder import Encoder, TextEncoder
from tercet.model.folder import assembled, towers
from tercet.model.towers import Towers
from tercet.model.vectors import Vectors
from tercet.model.vocabulary import PAD, UNKNOWN
from tercet.model.words import WordModel


@dataclass(frozen=True)
class Expansion:
    """What was done: ``shared`` words the map was fitted on, ``new`` words it gave a vector, ``fit`` its R² per table."""

    shared: int
    new: int
    fit: tuple[float, ...]


def expand(encoder: Encoder, vectors: Vectors) -> tuple[Encoder, Expansion]:
    """The encoder with a learned vector for each word of ``vectors`` that its tokenizer can tell.

    For each table E of learned vectors the map is argmin over A, b of sum over shared words of ||A v + b - E[w]||^2,
    without a penalty (Quick-Thoughts, section 4.1 and the authors' code; Kiros et al. 2015, arXiv:1506.06726, section
    2.2). Words of the training vocabulary keep their vectors; words with "_" (phrases) are left out.

    Raises:
        InputError: the encoder learns no word vectors, or shares fewer words with ``vectors`` than a map needs.
    """
    parts = [encoder.f, encoder.g] if isinstance(encoder, Towers) else [encoder]
    made, fits = [], []
    for part in parts:
        if not isinstance(part, TextEncoder) or not isinstance(part.backbone, WordModel):
            raise InputError("expand: this model learns no word vectors. Use a run of model=gru, towers or bag.")
        found, shared, new, fit = _expanded(part, vectors)
        made.append(found)
        fits.append(fit)
    return towers(*made) if len(made) == 2 else made[0], Expansion(shared, new, tuple(fits))


def _expanded(part: TextEncoder, vectors: Vectors) -> tuple[TextEncoder, int, int, float]:
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
    made = assembled(new, tokenizer, part.settings())
    assert isinstance(made, TextEncoder)
    made.head.load_state_dict(part.head.state_dict())
    return made
