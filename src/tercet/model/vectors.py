"""Pretrained word vectors: GloVe's and word2vec's text format, or a folder of ``embeddings.safetensors`` and ``vocab.txt``."""

from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from tercet.error import InputError
from tercet.notice import say_once
from tercet.paths import locate

ACCEPTED = "a text file with a word and its numbers on each line, or a folder with embeddings.safetensors and vocab.txt"


class Vectors(NamedTuple):
    """``matrix (V, E)`` float32; row i belongs to ``words[i]``. No word is there twice."""

    words: list[str]
    matrix: Tensor


def read_vectors(path: str, key: str) -> Vectors:
    """The vectors at ``path``, which may start under ``TERCET_DATA``.

    Raises:
        InputError: naming ``key``: there is no such file, or a line that is no word with E numbers.
    """
    try:
        return _read(path)
    except InputError as error:
        raise InputError(f"{key}={error}") from error


@lru_cache(maxsize=1)  # vocabulary and backbone ask for the same file
def _read(path: str) -> Vectors:
    file = locate(path)
    if not file.exists():
        raise InputError(f"{path} does not exist. It takes {ACCEPTED}.")
    try:
        words, matrix = _folder(file, path) if file.is_dir() else _text(file, path)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error}). It takes {ACCEPTED}.") from error
    first = {word: row for row, word in reversed(list(enumerate(words)))}
    if len(first) < len(words):
        say_once(f"{path}: {len(words) - len(first)} words come again; their first vector is kept.")
        rows = sorted(first.values())
        words, matrix = [words[row] for row in rows], matrix[rows]
    return Vectors(words, matrix)


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
