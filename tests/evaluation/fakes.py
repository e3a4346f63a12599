"""Sources in memory and encoders that are no model: the same text, the same vector, in every process."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import datasets
import torch


@dataclass(frozen=True)
class Listed:
    """A source that holds what it is given; a column called label is no text."""

    table: Mapping[str, Sequence]

    @property
    def columns(self):
        return tuple(name for name in self.table if name != "label")

    def rows(self):
        return datasets.Dataset.from_dict({name: list(values) for name, values in self.table.items()})

    def fingerprint(self):
        return "listed"


def words(texts):
    """Bags of hashed words."""
    z = torch.zeros(len(texts), 256)
    for row, text in zip(z, texts, strict=True):
        for word in text.lower().split():
            row[int(hashlib.md5(word.encode()).hexdigest(), 16) % 256] += 1
    return z


def noise(texts):
    """Directions that no word decides."""
    seeds = [int(hashlib.md5(text.encode()).hexdigest()[:15], 16) for text in texts]
    return torch.stack([torch.randn(8, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def collapsed(texts):
    return torch.full((len(texts), 37), 0.3)


def broken(texts):
    return torch.full((len(texts), 8), torch.nan)


@dataclass
class Counted:
    """Remembers every call of ``encode``."""

    encode: object = words
    calls: list = field(default_factory=list)

    def __call__(self, texts):
        self.calls.append(list(texts))
        return self.encode(texts)
