"""Choose columns, check and convert their cells, hold rows out."""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetInfo, Features

from tercet.errors import InputError, check_choice, did_you_mean, require

VERSION = "files-2"  # changes when the same files give other rows
BLOCK = 1 << 20  # bytes that are read at once
SAMPLED = 1 << 10  # blocks of the files of a stream that its fingerprint reads
SPLITS = ("train", "test", "all")
# The usual names of pairs and triplets: SimCSE's and those of Sentence Transformers; then of single texts.
USUAL = (("sent0", "sent1", "hard_neg"), ("sent0", "sent1"), ("anchor", "positive", "negative"), ("anchor", "positive"),
         ("text",), ("sentence",))  # fmt: skip


class Chunk(NamedTuple):
    """Some rows of a file, which ``name`` describes for messages.

    ``number (N,)`` counts lines or rows of the file from 1, as ``unit`` says. ``not_text`` has the name of each text column of
    JSON and a mask ``(N,)`` of its cells that are no string. ``blank`` lines were skipped.
    """

    name: str
    unit: str
    number: Sequence[int]
    table: pa.Table
    not_text: Sequence[tuple[str, Any]] = ()
    blank: int = 0


def as_dataset(table: pa.Table, fingerprint: str, features: Mapping[str, Any] | None = None) -> Dataset:
    """A table in memory as a ``datasets.Dataset``."""
    return Dataset(table, DatasetInfo(features=Features(features)) if features else None, fingerprint=fingerprint)


def text_columns(
    path: str, available: Sequence[str], columns: Sequence[str], example: Callable[[], str] | None = None
) -> tuple[str, ...]:
    """The named columns; none: a pair or triplet under its usual names, the only column, ``text`` or ``sentence``.

    ``example`` gives one that holds text, for the message where there is none of these.
    """
    require(len(set(columns)) == len(columns), f"`columns`=[{', '.join(columns)}]: name columns, none of them twice.")
    require(available, f"`path`={path} has no rows.")
    for name in columns:
        check_column(f"`path`={path}", available, name, "columns")
    usual = (columns,) if columns else (available,) if len(available) == 1 else USUAL
    found = [tuple(names) for names in usual if set(names) <= set(available)]
    if not found:
        advice = f"say which hold text, for example `columns`=[{example() if example else available[0]}]"
        raise InputError(f"`path`={path} has the columns {', '.join(available)}: {advice}.")
    return found[0]


def check_column(where: str, available: Sequence[str], name: str, parameter: str) -> str:
    """The name, if there is such a column; ``parameter`` is the one that named it, ``where`` the file."""
    hint = did_you_mean(name, available, "'")
    require(name in available, f"`{parameter}` names '{name}', but {where} has the columns {', '.join(available)}.{hint}")
    return name


def label_ids(column: pa.ChunkedArray, path: str, name: str) -> tuple[pa.ChunkedArray, list[str]]:
    """Each value's position among the sorted values, as int64, and those values as text; null and "" become -1.

    Texts are compared as they are, up to white space at their ends: 7 and 007 are two labels. If all of them are whole numbers
    they are sorted as numbers.
    """
    if pa.types.is_string(column.type):
        column = _trim(column)
    elif pa.types.is_floating(column.type) or pa.types.is_boolean(column.type) or pa.types.is_null(column.type):
        column = to_integers(column, path, name, "label")
    is_label = pa.types.is_integer(column.type) or pa.types.is_string(column.type)
    require(is_label, f"`label`={name}: `path`={path} holds {column.type} there; labels are text or integers.")
    values = pc.unique(column).drop_null().sort()
    if (numbers := _try_cast(values)) is not None:
        values = values.take(pc.sort_indices(numbers))  # stable
    return pc.fill_null(pc.index_in(column, values), -1).cast(pa.int64()), [str(value) for value in values.to_pylist()]


def to_integers(column: pa.ChunkedArray, path: str, name: str, parameter: str, advice: str = "") -> pa.ChunkedArray:
    """The column as int64; raises ``InputError`` with the first value that is no whole number of 64 bits."""
    if (numbers := _try_cast(column)) is None:
        given = (x for x in column.to_pylist() if x is not None and _try_cast(pa.array([x], column.type)) is None)
        example = next(given, column.type)
        accepted = "whole numbers of 64 bits are accepted"
        raise InputError(f"`{parameter}`={name}: `path`={path} holds {example!r} there; {accepted}.{advice}")
    return numbers


def label_numbers(column: pa.ChunkedArray, path: str, name: str, advice: str) -> pa.ChunkedArray:
    """Labels that are numbers already, as int64; raises ``InputError`` for others. The text 007 is no number: it is not 7."""
    column = _trim(column) if pa.types.is_string(column.type) else column
    numbers = to_integers(column, path, name, "label", advice)
    if pa.types.is_string(column.type) and len(others := column.filter(pc.not_equal(numbers.cast(pa.string()), column))):
        raise InputError(f"`label`={name}: `path`={path} holds '{others[0]}' there, which is a text, not a number.{advice}")
    return numbers


def _trim(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Texts without white space at their ends; null where nothing is left."""
    column = pc.utf8_trim_whitespace(column)
    return pc.if_else(pc.equal(column, ""), None, column)


def is_blank(column: Any) -> Any:
    """``(N,)``, true for cells of nothing but white space, fillers, and characters of no width, as marks without a letter."""
    return pc.match_substring_regex(column, r"^[\p{Z}\p{Cf}\p{Mn}\s\x1c-\x1f\x85\x{115F}\x{1160}\x{2800}\x{3164}\x{FFA0}]*$")


def _try_cast(column: Any) -> Any:
    try:
        return column.cast(pa.int64())
    except pa.ArrowException:
        return None


def where_values(where: Mapping[str, Any] | None, available: Sequence[str], path: str) -> dict[str, list[Any]]:
    """The accepted values of each column that ``where`` names; one alone needs no list."""
    values = {}
    for name, value in (where or {}).items():
        check_column(f"`path`={path}", available, str(name), "where")
        values[str(name)] = [value] if value is None or isinstance(value, str | int | float | bool) else list(value)
    return values


def where_mask(table: pa.Table, where: Mapping[str, Sequence[Any]], path: str) -> Any:
    """``(N,)``, true for rows that have one of the values, which may be written as text, in each column of ``where``."""
    keep = np.ones(len(table), dtype=np.bool_)
    for name, values in where.items():
        column = table[name]
        try:
            accepted = pa.array([None if value is None else str(value) for value in values], pa.string()).cast(column.type)
            keep &= np.asarray(pc.is_in(column, value_set=accepted))
        except (pa.ArrowException, UnicodeError) as error:
            raise InputError(f"`where`={{{name}: {values}}}: `path`={path} holds {column.type} there.") from error
    return keep


def plain_schema(schema: pa.Schema) -> pa.Schema:
    """The schema without dictionaries, all strings as ``string``, all bytes but large ones as ``binary``."""
    plain = {pa.large_string(): pa.string(), pa.string_view(): pa.string(), pa.binary_view(): pa.binary()}
    types = (kind.value_type if pa.types.is_dictionary(kind) else kind for kind in schema.types)
    return pa.schema(zip(schema.names, (plain.get(kind, kind) for kind in types), strict=True))


def files_fingerprint(kind: str, files: Sequence[Path], whole: bool = True) -> str:
    """Hash the files' kind and contents in order; with ``whole`` false their sizes and at most a GiB of them, evenly spread."""
    blocks = 0 if whole else max(2, SAMPLED // max(1, len(files)))
    parts = [_hash_file(file, blocks, os.stat(file).st_mtime_ns, os.stat(file).st_size) for file in files]
    return text_fingerprint(VERSION, kind, *parts)


def text_fingerprint(*parts: str) -> str:
    """One hash of several strings."""
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


@lru_cache(maxsize=1 << 16)
def _hash_file(file: Path, blocks: int, modified: int, size: int) -> str:
    """Hash the first, the last and other MiB between them, ``blocks`` in all; 0: the whole file.

    ``modified`` and ``size`` are part of the cache's key, so that a file that was written anew is read again.
    """
    digest = hashlib.blake2b(f"{not blocks}{size}".encode(), digest_size=16)
    whole = not blocks or size <= blocks * BLOCK
    starts = range(0, size, BLOCK) if whole else [i * (size - BLOCK) // (blocks - 1) for i in range(blocks)]
    with file.open("rb") as stream:
        for start in starts:
            stream.seek(start)
            digest.update(stream.read(BLOCK))
    return digest.hexdigest()


def check_split(split: str, held_out: int, validation_rows: int = 0) -> None:
    """Raise ``InputError`` for an unknown split, and for a test split that has no rows."""
    check_choice("split", split, (*SPLITS, "validation") if validation_rows else SPLITS)
    require(split != "test" or held_out, "`held_out`=0 leaves no test side. Use `held_out`=2 or more.")


def split_rows(
    table: pa.Table, by: pa.ChunkedArray, split: str, held_out: int, path: str, validation_rows: int = 0
) -> pa.Table:
    """The rows of a split; those of "test" are the ones with the smallest hashes of ``by (N,)``, then come "validation"'s.

    Equal values, up to case and white space, stay together. The test split has at most ``min(held_out, max(2, N // 5))`` rows,
    the validation split as many at most of those that are left. They depend neither on the order of the rows nor on a seed.
    """
    sizes = {"test": ("held_out", held_out), "validation": ("validation_rows", validation_rows)}
    if split == "all" or not any(size for _, size in sizes.values()):
        return table
    sides = np.full(len(by), "train", dtype="U10")
    for side, (parameter, size) in sizes.items():
        if size:
            left = np.flatnonzero(sides == "train")
            sides[left[_smallest_hashes(by.take(left), size, parameter, path)]] = side
    return table.filter(pa.array(sides == split))


def _smallest_hashes(by: pa.ChunkedArray, held_out: int, parameter: str, path: str) -> Any:
    """Whether each row of ``by (N,)`` is held out, ``(N,)``; ``parameter`` is the one that asks for so many rows."""
    here, count, limit = f"`path`={path} has", len(by), min(held_out, max(2, len(by) // 5))
    need = f"{count} rows: one sentence teaches nothing, and `{parameter}`={held_out} needs 4 rows or more"
    require(count >= 4, f"{here} {need}.")
    require(held_out >= 2, f"`{parameter}`={held_out}: 0 (none), or 2 rows or more.")
    texts = (text for chunk in by.cast(pa.string()).fill_null("").chunks for text in chunk.to_numpy(zero_copy_only=False))
    normalized = (" ".join(text.lower().split()).encode() for text in texts)
    digests = b"".join(hashlib.blake2b(text, digest_size=8).digest() for text in normalized)
    hashes = np.frombuffer(digests, dtype="<u8").astype(np.uint64)
    values, group, sizes = np.unique(hashes, return_inverse=True, return_counts=True)
    chosen, left = np.zeros(len(values), dtype=np.bool_), limit
    for value, size in enumerate(sizes):  # by hash; a group that is larger than what is left stays in train
        chosen[value] = size <= left
        left -= size if size <= left else 0
    few = f"{here} {len(values)} different values in {count} rows, each {sizes.min()} times or more: too few to hold some out"
    advice = "Add others, or train on all of them with `split`=all and without a test source."
    most = f"at most {limit} rows (a fifth) with all that are equal"
    require(limit - left >= 2 and not chosen.all(), f"{few}, {most}. {advice}")
    return chosen[group]
