"""Files of vectors: ``.npy`` with a JSON file beside it, or Parquet with ids and texts; in fewer bits on request."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tercet.errors import check_choice, refuse_damaged, require
from tercet.paths import atomic_write, locate, read_json_file, write_text

Array = npt.NDArray[Any]

PRECISIONS = {"float32": np.float32, "float16": np.float16, "int8": np.int8, "binary": np.uint8}
SUFFIXES = (".npy", ".parquet")
VERSION = 1
KEY = b"tercet"  # of the metadata in Parquet


@dataclass(frozen=True)
class VectorInfo:
    """What a file of N vectors says of itself: of which model and data, and what its numbers mean.

    ``signature`` are the model's vectors of some probes, ``data`` a hash of the items. ``calibration`` of int8 has the least
    value of each column and its steps: a value is least + (code + 128) * step. ``left_out`` are the ids of images that could
    not be read.
    """

    count: int
    dimension: int
    precision: str = "float32"
    model: str = ""
    similarity: str = "cosine"
    prompt: str = ""
    signature: list[list[float]] = field(default_factory=list)
    data: str = ""
    calibration: list[list[float]] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)
    version: int = VERSION


def quantize(x: Array, info: VectorInfo) -> Array:
    """``(N, D)`` float32 in the precision of ``info``: int8 in the steps of its calibration, binary as ``(N, D / 8)`` bytes.

    A bit is 1 where the value is above 0; the last byte is filled with 0. Float16 has no values above 65,504.

    >>> x = np.array([[0.5, -1.0], [1.0, 1.0]], dtype=np.float32)
    >>> quantize(x, VectorInfo(2, 2, "int8", calibration=calibrate([x])))
    array([[-128, -128],
           [ 127,  127]], dtype=int8)
    """
    if info.precision == "binary":
        return np.packbits(x > 0, axis=1)
    if info.precision == "int8":
        least, step = np.asarray(info.calibration, dtype=np.float32)
        return cast(Array, np.clip(np.rint((x - least) / step) - 128, -128, 127).astype(np.int8))
    kind = np.float16 if info.precision == "float16" else np.float32
    largest = float(np.finfo(kind).max)
    require(np.abs(x).max(initial=0) <= largest, f"`precision`={info.precision} holds no value above {largest}. Use float32.")
    return x.astype(kind)


def dequantize(codes: Array, info: VectorInfo) -> npt.NDArray[np.float32]:
    """The float32 ``(N, D)`` that ``quantize`` had; of binary -1 and 1."""
    if info.precision == "binary":
        return np.unpackbits(codes, axis=1)[:, : info.dimension].astype(np.float32) * 2 - 1
    if info.precision == "int8":
        least, step = np.asarray(info.calibration, dtype=np.float32)
        return (codes.astype(np.float32) + 128) * step + least  # type: ignore[no-any-return]
    return np.asarray(codes, dtype=np.float32)


def calibrate(blocks: Iterable[Array]) -> list[list[float]]:
    """The least value of each column, and the size of 255 steps up to the largest."""
    extremes = [(block.min(0), block.max(0)) for block in blocks if len(block)]
    least, most = np.min([low for low, _ in extremes], 0), np.max([high for _, high in extremes], 0)
    return [least.tolist(), np.maximum((most - least) / 255, np.finfo(np.float32).tiny).tolist()]


class Vectors:
    """N vectors of a file, read when they are indexed: ``vectors[rows]`` is ``(n, D)`` float32.

    ``codes`` are as in the file; ``texts`` is None where it has none, ``ids`` where they are 0 to N - 1.

    >>> vectors = Vectors(np.packbits([[1, 0, 1]], axis=1), VectorInfo(1, 3, "binary"))
    >>> vectors.shape, vectors[0:1]
    ((1, 3), array([[ 1., -1.,  1.]], dtype=float32))
    """

    def __init__(self, codes: Array, info: VectorInfo, ids: list[Any] | None = None, texts: list[str] | None = None) -> None:
        self.codes, self.info, self.ids, self.texts = codes, info, ids, texts

    @property
    def shape(self) -> tuple[int, int]:
        """N and D."""
        return len(self.codes), self.info.dimension

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, rows: Any) -> npt.NDArray[np.float32]:
        return dequantize(np.asarray(self.codes[rows]), self.info)


def hash_items(items: Any) -> tuple[int, str]:
    """The number of items, and a hash of them in order: images that are files count by name, size and time.

    >>> hash_items(["a", "b"]) == hash_items(["a", "b"]), hash_items(["ab"])[0]
    (True, 1)
    """
    require(iter(items) is not items, "`items` can be read only once: give a list, or what can be iterated several times.")
    digest, count = hashlib.blake2b(digest_size=16), 0
    for item in items:
        count += 1
        if isinstance(item, dict):
            item = item["bytes"] if item["bytes"] is not None else _describe_file(item["path"])
        content = item.encode(errors="surrogatepass") if isinstance(item, str) else item
        digest.update(b"%d " % len(content) + content)
    return count, digest.hexdigest()


def _describe_file(path: str) -> str:
    try:
        info = os.stat(path)
    except OSError:
        return path
    return f"{path} {info.st_size} {info.st_mtime_ns}"


def check_suffix(path: Path, parameter: str) -> None:
    """Raise ``InputError`` naming ``parameter`` for a file that is not of ``SUFFIXES``."""
    accepted = f"the name of a file that ends in {' or '.join(SUFFIXES)} is needed"
    require(path.suffix in SUFFIXES and not path.is_dir(), f"`{parameter}`={path}: {accepted}.")


def write_vectors(path: Path, info: VectorInfo, blocks: Iterator[tuple[Array, Sequence[Any], Sequence[str]]]) -> None:
    """Write ``blocks`` of vectors ``(n, D)`` with their ids and texts, whole or not at all; .npy has no texts."""
    if path.suffix == ".npy":
        write_text(_beside(path), json.dumps(asdict(info)) + "\n")
        width = -(-info.dimension // 8) if info.precision == "binary" else info.dimension
        kind = np.dtype(PRECISIONS[info.precision])
        with atomic_write(path) as partial:
            write_array(partial, kind, (info.count, width), (quantize(x, info) for x, _, _ in blocks))
        return
    empty = _table(quantize(np.zeros((0, info.dimension), np.float32), info), [], [], info)
    with atomic_write(path) as partial, pq.ParquetWriter(partial, empty.schema) as writer:
        for x, ids, texts in blocks:
            writer.write_table(_table(quantize(x, info), ids, texts, info))


def write_array(path: Path, kind: "np.dtype[Any]", shape: tuple[int, ...], blocks: Iterable[Array]) -> None:
    """Write an array in numpy's format, block by block; numpy's own writer does not tell of a full disk by its number."""
    header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": shape}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            file.write(np.ascontiguousarray(block, kind).data)


def _table(codes: Array, ids: Sequence[Any], texts: Sequence[str], info: VectorInfo) -> pa.Table:
    vector = pa.FixedSizeListArray.from_arrays(pa.array(codes.ravel()), codes.shape[1])
    columns = {"id": pa.array(ids, pa.int64()), "text": pa.array(texts, pa.string()), "vector": vector}
    return pa.table(columns).replace_schema_metadata({KEY: json.dumps(asdict(info))})


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def read_info(path: Path) -> VectorInfo | None:
    """What a file of vectors says of itself; None for one that another program wrote."""
    with refuse_damaged(f"`vectors`={path}"):
        if path.suffix == ".npy":
            values = read_json_file(_beside(path)) if _beside(path).is_file() else None
        else:
            metadata = pq.read_schema(path).metadata or {}
            values = json.loads(metadata[KEY]) if KEY in metadata else None
        if values is None:
            return None
        require(values["version"] <= VERSION, f"`vectors`={path} was written by a later version of tercet. Upgrade tercet.")
        info = VectorInfo(**values)
        check_choice("precision", info.precision, tuple(PRECISIONS))
    return info


def open_vectors(name: str | Path) -> Vectors:
    """The vectors of a file, which need not be from ``encode_to``: .npy ``(N, D)``, or Parquet with a column ``vector``."""
    path = locate(str(name))
    check_suffix(path, "vectors")
    require(path.is_file(), f"`vectors`={name} does not exist (looked for {path}).")
    info = read_info(path)
    with refuse_damaged(f"`vectors`={name}"):
        if path.suffix == ".npy":
            codes, ids, texts = np.load(path, mmap_mode="r", allow_pickle=False), None, None
        else:
            codes, ids, texts = _read_parquet(pq.read_table(path), name)
    if info is None:
        accepted = "as another program wrote it; float32 and float16 are accepted"
        require(codes.dtype.kind == "f", f"`vectors`={name} holds {codes.dtype}, {accepted}.")
        info = VectorInfo(len(codes), codes.shape[-1])
    width = -(-info.dimension // 8) if info.precision == "binary" else info.dimension
    fits = codes.shape == (info.count, width)
    require(fits, f"`vectors`={name} has the shape {codes.shape}, but is described as {info.count} x {width}: copy it anew.")
    return Vectors(codes, info, ids, texts)


def _read_parquet(table: pa.Table, name: str | Path) -> tuple[Array, list[Any] | None, list[str] | None]:
    has = f"`vectors`={name} has the columns {', '.join(table.column_names)}"
    require("vector" in table.column_names, f"{has}: a column `vector` of lists of numbers is needed.")
    column = table["vector"].combine_chunks()
    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    is_list = any(is_kind(column.type) for is_kind in kinds) and not column.null_count
    require(is_list, f"`vectors`={name}: its column vector holds {column.type}, or nothing in some row; lists are needed.")
    values, lengths = column.flatten(), pc.unique(pc.list_value_length(column)).to_pylist()
    require(len(lengths) == 1 and not values.null_count, f"`vectors`={name}: vectors of one length are needed, got {lengths}.")
    ids, texts = (table[key].to_pylist() if key in table.column_names else None for key in ("id", "text"))
    are_texts = texts is None or all(isinstance(text, str) for text in texts)
    require(are_texts, f"`vectors`={name}: its column text holds cells that are no text.")
    return values.to_numpy(zero_copy_only=False).reshape(len(column), -1), ids, texts
