"""Labelled images in folders, Parquet files or on the hub."""

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, DatasetInfo, Features, Value
from datasets.table import InMemoryTable

from tercet.data.columns import check_column, label_ids, matches_any
from tercet.data.file_reader import column_names, open_hub, read_chunks
from tercet.data.paths import IMAGE, LABEL, DataPath, resolve_images
from tercet.data.splits import files_fingerprint, held_out_rows, text_fingerprint
from tercet.data.text_files import CHOICES, listed
from tercet.errors import InputError


@dataclass(frozen=True)
class ImageFiles:
    """A folder ``root/label/file``, Parquet with an image column (bytes, or ``{bytes, path}``), or a hub data set.

    ``image`` and ``label`` name the columns; null: found by their names, or as the only column that can hold images. In a
    folder the label is the name of the folder that a file lies in; a file in ``root`` itself has none. ``where`` keeps
    rows by value: ``{split: train}``. With ``held_out`` above 0, ``split`` "test" is about that many images (a fifth of
    all at most) of whole labels, chosen by a hash, so that no label is on both sides; "train" is the others, "all" both.

    Raises:
        InputError: here or in a method, for whatever cannot be used. An image that cannot be decoded is found later.
    """

    path: str
    image: str | None
    label: str | None
    where: Mapping[str, Any] | None
    split: str
    held_out: int

    def __post_init__(self) -> None:
        if self.split not in CHOICES["split"]:
            raise InputError(f"data.split={self.split}: use one of {', '.join(CHOICES['split'])}.")
        if self.split == "test" and self.held_out == 0:
            raise InputError("data.held_out=0 leaves no test side. Use data.held_out=2 or more.")
        place = resolve_images(self.path)
        available = ["image", "label"] if place.kind == "folder" else column_names(place)
        image = check_column(self.path, available, self.image, "data.image") if self.image else _first(available, IMAGE)
        image = image or _only(place)
        if image is None:
            raise InputError(
                f"data.path={self.path} has the columns {', '.join(available)}: say which holds images with data.image=..."
            )
        label = check_column(self.path, available, self.label, "data.label") if self.label else _first(available, LABEL)
        if label is None and self.held_out:
            raise InputError(
                f"data.held_out={self.held_out} holds out whole labels, but data.path={self.path} has the columns "
                f"{', '.join(available)}. Name that of the labels with data.label=..., or use data.held_out=0."
            )
        where = {check_column(self.path, available, str(n), "data.where"): listed(v) for n, v in (self.where or {}).items()}
        for name, value in (("image", image), ("label", label), ("where", where)):
            object.__setattr__(self, name, value)

    def __hash__(self) -> int:
        return hash((self.path, self.image, self.label, self.split))

    @property
    def columns(self) -> tuple[str, ...]:
        """One view."""
        return ("image",)

    def rows(self) -> Dataset:
        """``image`` as ``{"bytes", "path"}``, not decoded, and ``label`` with its names."""
        table = self._table()
        for name, values in (self.where or {}).items():
            table = table.filter(matches_any(table[name], values, self.path, name))
        if len(table) == 0:
            left = f"data.where={dict(self.where or {})} keeps no row of" if self.where else "There is no image in"
            raise InputError(f"{left} data.path={self.path}.")
        assert self.image is not None
        cells, features = {"image": _cells(table[self.image], self.path, self.image)}, {"image": CELL}
        if self.label is not None:
            cells["label"], names = label_ids(table[self.label], self.path, self.label)
            features["label"] = ClassLabel(names=names) if names else Value("int64")
        out = pa.table(cells)
        if self.held_out and self.split != "all":
            test = held_out_rows(table[self.label], self.held_out, self.path)
            out = out.filter(pa.array(test if self.split == "test" else ~test))
        return Dataset(InMemoryTable(out), info=DatasetInfo(features=Features(features)), fingerprint=self.fingerprint())

    def _table(self) -> pa.Table:
        place = resolve_images(self.path)
        if place.kind == "folder":
            root = place.files[0]
            files = place.files[1:]
            labels = [None if file.parent == root else file.parent.relative_to(root).as_posix() for file in files]
            cells = {"bytes": pa.nulls(len(files), pa.binary()), "path": pa.array(map(str, files), pa.string())}
            return pa.table({"image": pa.StructArray.from_arrays(list(cells.values()), list(cells)), "label": labels})
        wanted = [name for name in (self.image, self.label, *(self.where or ())) if name is not None]
        tables = [piece.table for piece in read_chunks(place, [], wanted, streaming=False)]
        return pa.concat_tables(tables, promote_options="permissive")

    def fingerprint(self) -> str:
        """Hashes what the files hold and every option; of folders names and sizes."""
        place = resolve_images(self.path)
        options = repr((*astuple(self)[1:], self.path if place.kind == "hub" else ""))
        if place.kind == "folder":
            root = place.files[0]
            return text_fingerprint(options, *(f"{f.relative_to(root)}{f.stat().st_size}" for f in place.files[1:]))
        return text_fingerprint(options, files_fingerprint(place, whole=True))


CELL = {"bytes": Value("binary"), "path": Value("string")}
CELL_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def _first(available: list[str], names: tuple[str, ...]) -> str | None:
    lower = {name.lower(): name for name in available}
    return next((lower[name] for name in names if name in lower), None)


def _only(place: DataPath) -> str | None:
    """The one column that is of an image's type."""
    if place.kind == "hub":
        features = open_hub(place.path, streaming=True).features
        schema = features.arrow_schema if features else pa.schema([])
    else:
        schema = pq.read_schema(place.files[0])
    names = [field.name for field in schema if _is_bytes(field.type) or _is_struct(field.type)]
    return names[0] if len(names) == 1 else None


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_struct(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and {"bytes", "path"} <= {kind.field(i).name for i in range(kind.num_fields)}


def _cells(column: pa.ChunkedArray, path: str, name: str) -> pa.ChunkedArray:
    """Bytes or structs, to structs; chunk by chunk, for an array of bytes ends at 2 GB."""
    kind = column.type
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if not (text or _is_bytes(kind) or _is_struct(kind)):
        raise InputError(f"data.image={name}: data.path={path} holds {kind} there; images are bytes or file names.")

    def struct(chunk: pa.Array) -> pa.Array:
        none = pa.nulls(len(chunk))
        if _is_struct(kind):
            data, file = pc.struct_field(chunk, "bytes"), pc.struct_field(chunk, "path")
        else:
            data, file = (none, chunk) if text else (chunk, none)
        return pa.StructArray.from_arrays([data.cast(pa.binary()), file.cast(pa.string())], ["bytes", "path"])

    return pa.chunked_array([struct(c) for c in column.chunks], type=CELL_TYPE)
