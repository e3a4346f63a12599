"""Fingerprints of files, and deterministic held-out splits."""

import hashlib
import os
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tercet.data.paths import DataPath
from tercet.errors import InputError

VERSION = "files-1"  # changes when the same files give other rows
EDGE = 1 << 20  # bytes
SPLITS = ("train", "test", "all")


def files_fingerprint(data: DataPath, whole: bool) -> str:
    """Hash the files' kind and contents in order; with ``whole`` false only their sizes, first and last MiB."""
    parts = [_hash_file(file, whole, os.stat(file).st_mtime_ns, os.stat(file).st_size) for file in data.files]
    return text_fingerprint(VERSION, data.kind, *parts)


def text_fingerprint(*parts: str) -> str:
    """One hash of several strings."""
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


@lru_cache(maxsize=4096)
def _hash_file(file: Path, whole: bool, modified: int, size: int) -> str:
    """``modified`` and ``size`` are part of the cache's key, so that a file that was written anew is read again."""
    digest = hashlib.blake2b(f"{whole}{size}".encode(), digest_size=16)
    with file.open("rb") as stream:
        for start in range(0, size, EDGE) if whole else (0, max(0, size - EDGE)):
            stream.seek(start)
            digest.update(stream.read(EDGE))
    return digest.hexdigest()


def check_split(split: str, held_out: int) -> None:
    """Raise ``InputError`` for an unknown split, and for a test split that has no rows."""
    if split not in SPLITS:
        raise InputError(f"`split`={split}: use one of {', '.join(SPLITS)}.")
    if split == "test" and held_out == 0:
        raise InputError("`held_out`=0 leaves no test side. Use `held_out`=2 or more.")


def split_rows(table: pa.Table, by: pa.ChunkedArray, split: str, held_out: int, path: str) -> pa.Table:
    """The rows of a split; those of "test" are the ones with the smallest hashes of ``by (N,)``.

    Equal values, up to case and white space, stay together. The test split has at most ``min(held_out, max(2, N // 5))`` rows.
    It depends neither on the order of the rows nor on a seed.

    Raises:
        InputError: fewer than 4 rows, or too few different values.
    """
    if held_out == 0 or split == "all":
        return table
    count, limit = len(by), min(held_out, max(2, len(by) // 5))
    if count < 4:
        raise InputError(
            f"`path`={path} has {count} rows: one sentence teaches nothing, and `held_out`={held_out} needs 4 rows or more."
        )
    if held_out < 2:
        raise InputError(f"`held_out`={held_out}: 0 (no test side), or 2 rows or more.")
    values, group, sizes = np.unique(_hash_values(by), return_inverse=True, return_counts=True)
    chosen, left = np.zeros(len(values), dtype=np.bool_), limit
    for value, size in enumerate(sizes):  # by hash; a group that is larger than what is left stays in train
        chosen[value] = size <= left
        left -= size if size <= left else 0
    if limit - left < 2 or chosen.all():
        raise InputError(
            f"`path`={path} has {len(values)} different values in {count} rows, each {sizes.min()} times or more: too few to "
            f"hold some out, at most {limit} rows (a fifth) with all that are equal. Add others, or train on all of them with "
            "`split`=all and without a test source."
        )
    return table.filter(pa.array(chosen[group] if split == "test" else ~chosen[group]))


def _hash_values(column: pa.ChunkedArray) -> npt.NDArray[np.uint64]:
    texts = (text for chunk in column.cast(pa.string()).fill_null("").chunks for text in chunk.to_numpy(zero_copy_only=False))
    normalized = (" ".join(text.lower().split()).encode() for text in texts)
    digests = b"".join(hashlib.blake2b(text, digest_size=8).digest() for text in normalized)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)
