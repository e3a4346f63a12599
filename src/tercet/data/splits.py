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

VERSION = "files-1"  # another name when the same files would give other rows
EDGE = 1 << 20


def files_fingerprint(place: DataPath, whole: bool) -> str:
    """Hashes the files' kind and contents in order; with ``whole`` false their sizes, first and last MiB."""
    parts = [_file_print(file, whole, os.stat(file).st_mtime_ns, os.stat(file).st_size) for file in place.files]
    return text_fingerprint(VERSION, place.kind, *parts)


def text_fingerprint(*parts: str) -> str:
    """One hash of several strings."""
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


@lru_cache(maxsize=4096)
def _file_print(file: Path, whole: bool, changed: int, size: int) -> str:
    """``changed`` and ``size`` make the memory of an earlier call invalid when the file is written anew."""
    digest = hashlib.blake2b(f"{whole}{size}".encode(), digest_size=16)
    with file.open("rb") as stream:
        if whole:
            while block := stream.read(EDGE):
                digest.update(block)
        else:
            digest.update(stream.read(EDGE))
            stream.seek(max(0, size - EDGE))
            digest.update(stream.read(EDGE))
    return digest.hexdigest()


def held_out_rows(column: pa.ChunkedArray, held_out: int, path: str) -> npt.NDArray[np.bool_]:
    """``(N,)`` true on the test side: equal values stay together, the smallest hashes are held out.

    Values count as equal up to case and white space. The side has at most ``min(held_out, max(2, N // 5))`` rows; the
    order of the rows, the seed and the machine change nothing.

    Raises:
        InputError: fewer than 4 rows, or too few different ones to cut.
    """
    limit = min(held_out, max(2, len(column) // 5))
    if len(column) < 4:
        raise InputError(
            f"data.path={path} has {len(column)} rows: one sentence teaches nothing, and data.held_out={held_out} "
            "needs 4 rows or more."
        )
    if held_out < 2:
        raise InputError(f"data.held_out={held_out}: 0 (no test side), or 2 rows or more.")
    values, group, sizes = np.unique(_hashes(column), return_inverse=True, return_counts=True)
    chosen, left = np.zeros(len(values), dtype=np.bool_), limit
    for value, size in enumerate(sizes):  # in the order of the hashes; a group too large for what is left stays in train
        if size <= left:
            chosen[value] = True
            left -= size
            if left == 0:
                break
    if limit - left < 2 or chosen.all():
        raise InputError(
            f"data.path={path} has {len(values)} different values in {len(column)} rows, each {sizes.min()} times or more: too "
            f"few to hold some out, at most {limit} rows (a fifth) with all that are equal. Add others; "
            "data.test=null data.train.split=all evaluation@test=none trains on all of them."
        )
    return chosen[group]


def _hashes(column: pa.ChunkedArray) -> npt.NDArray[np.uint64]:
    texts = (chunk.to_numpy(zero_copy_only=False) for chunk in column.cast(pa.string()).fill_null("").chunks)
    digests = b"".join(_digest(text) for chunk in texts for text in chunk)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(" ".join(text.lower().split()).encode(), digest_size=8).digest()
