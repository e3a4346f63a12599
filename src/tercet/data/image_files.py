"""Labeled images in folders, Parquet files or on the hub."""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, Value

from tercet.data import columns as cols
from tercet.data.file_reader import DataPath, column_names, open_hub, read_chunks, resolve, visible_files
from tercet.errors import require
from tercet.messages import warn_once
from tercet.paths import locate

ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".pgm", ".ppm"}
IMAGE_NAMES = ("image", "img", "picture", "photo", "face", "pixels")
LABEL_NAMES = ("label", "identity", "person", "class", "target", "category", "name")
ACCEPTED = "a folder root/label/file, .parquet files with an image column, or a hub id (owner/name)"
CELL = {"bytes": Value("binary"), "path": Value("string")}
CELL_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@dataclass(frozen=True)
class ImageFiles:
    """A folder ``root/label/file``, Parquet with an image column (bytes, or ``{bytes, path}``), or a hub data set.

    ``image`` and ``label`` name the columns; None: found by their usual names, or as the only column that can hold images. In
    a folder the label is the name of the folder that a file is in; a file in ``root`` itself has none. ``where`` keeps rows by
    value: ``{"split": "train"}``. With ``held_out`` above 0, the ``split`` "test" has about that many images, at most a fifth,
    of whole labels chosen by a hash, so that no label is in both splits; "train" has the others, "all" both. With
    ``validation_rows`` about as many of the other images, of whole labels too, are the ``split`` "validation".

    >>> import pathlib, tempfile
    >>> from PIL import Image
    >>> root = pathlib.Path(tempfile.mkdtemp())
    >>> for name in ("ada", "bob"):
    ...     (root / name).mkdir()
    ...     Image.new("L", (32, 32)).save(root / name / "1.png")
    >>> ImageFiles(str(root)).rows()["label"][:]
    [0, 1]
    """

    path: str
    image: str | None = None
    label: str | None = None
    where: Mapping[str, Any] | None = field(default=None, hash=False)
    split: str = "all"
    held_out: int = 0
    validation_rows: int = 0
    columns: ClassVar[tuple[str, ...]] = ("image",)

    def __post_init__(self) -> None:
        cols.check_split(self.split, self.held_out, self.validation_rows)
        data, here = resolve_images(self.path), f"`path`={self.path}"
        names = ["image", "label"] if data.kind == "folder" else column_names(data)
        image = cols.check_column(here, names, self.image, "image") if self.image else _first(names, IMAGE_NAMES)
        image = image or _only_image_column(data)
        has = f"{here} has the columns {', '.join(names)}"
        require(image, f"{has}: say which holds images with `image`=...")
        label = cols.check_column(here, names, self.label, "label") if self.label else _first(names, LABEL_NAMES)
        for key in ("held_out", "validation_rows"):
            advice = f"Name that of the labels with `label`=..., or use `{key}`=0."
            count = getattr(self, key)
            require(label or not count, f"`{key}`={count} holds out whole labels, but {has}. {advice}")
        where = {cols.check_column(here, names, str(n), "where"): cols.as_list(v) for n, v in (self.where or {}).items()}
        vars(self).update(image=image, label=label, where=where)

    @property
    def provides(self) -> frozenset[str]:
        """What samplers, objectives and evaluators may need."""
        return frozenset({"all_rows"} | ({"label"} if self.label is not None else set()))

    def rows(self) -> Dataset:
        """``image`` as ``{"bytes", "path"}``, not decoded, and ``label`` with its names."""
        table = self._table()
        for name, values in (self.where or {}).items():
            table = table.filter(cols.matches_any(table[name], values, self.path, name))
        reason = f"`where`={self.where} keeps no row of" if self.where else "There is no image in"
        require(len(table), f"{reason} `path`={self.path}.")
        assert self.image is not None
        cells, features = {"image": _image_cells(table[self.image], self.path, self.image)}, {"image": CELL}
        if self.label is not None:
            cells["label"], names = cols.label_ids(table[self.label], self.path, self.label)
            features["label"] = ClassLabel(names=names) if names else Value("int64")
        by = table[self.label or self.image]  # without labels nothing is held out
        rows = cols.split_rows(pa.table(cells), by, self.split, self.held_out, self.path, self.validation_rows)
        return cols.as_dataset(rows, self.fingerprint(), features)

    def _table(self) -> pa.Table:
        data = resolve_images(self.path)
        if data.kind == "folder":
            root, *files = data.files
            labels = [None if file.parent == root else file.parent.relative_to(root).as_posix() for file in files]
            cells = [pa.nulls(len(files), pa.binary()), pa.array(map(str, files), pa.string())]
            return pa.table({"image": pa.StructArray.from_arrays(cells, ["bytes", "path"]), "label": labels})
        names = [name for name in (self.image, self.label, *(self.where or ())) if name is not None]
        tables = [chunk.table for chunk in read_chunks(data, [], names, streaming=False)]
        return pa.concat_tables(tables, promote_options="permissive")

    def fingerprint(self) -> str:
        """Hash the files' contents and every option; of the images of a folder their names and sizes."""
        data = resolve_images(self.path)
        options = repr((*astuple(self)[1:], self.path if data.kind == "hub" else ""))
        if data.kind == "folder":
            root, *files = data.files
            return cols.text_fingerprint(options, *(f"{f.relative_to(root)}{f.stat().st_size}" for f in files))
        return cols.text_fingerprint(options, cols.files_fingerprint(data.kind, data.files, True))


def resolve_images(path: str) -> DataPath:
    """Find the images that a path names; of kind "folder", ``files`` are its root and the images."""
    here = locate(path)
    if here.is_dir():
        files = sorted(visible_files(here))
        images = [f for f in files if f.suffix.lower() in ENDINGS]
        if images:
            if others := len(files) - len(images):
                warn_once(f"{path}: {others} of {len(files)} files are no images by their names; left out.")
            return DataPath(path, "folder", (here, *images))
        is_parquet = any(f.suffix.lower() == ".parquet" for f in files)
        require(is_parquet, f"`path`={path}: no image among {len(files)} files. `path` takes {ACCEPTED}.")
    data = resolve(path)
    is_readable = data.kind in ("parquet", "hub")
    require(is_readable, f"`path`={path} is of kind {data.kind}. For images `path` takes {ACCEPTED}.")
    return data


def _first(available: Sequence[str], names: Sequence[str]) -> str | None:
    lower = {name.lower(): name for name in available}
    return next((lower[name] for name in names if name in lower), None)


def _only_image_column(data: DataPath) -> str | None:
    """The one column that has the type of images."""
    if data.kind == "hub":
        features = open_hub(data.path, streaming=True).features
        schema = features.arrow_schema if features else pa.schema([])
    else:
        schema = pq.read_schema(data.files[0])
    names = [field.name for field in schema if _is_bytes(field.type) or _is_struct(field.type)]
    return names[0] if len(names) == 1 else None


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_struct(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and {"bytes", "path"} <= {field.name for field in kind}


def _image_cells(column: pa.ChunkedArray, path: str, name: str) -> pa.ChunkedArray:
    """Bytes, file names or structs as structs; chunk by chunk, since an array of bytes ends at 2 GB."""
    kind = column.type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    is_image = is_text or _is_bytes(kind) or _is_struct(kind)
    require(is_image, f"`image`={name}: `path`={path} holds {kind} there; images are bytes or file names.")

    def struct(chunk: pa.Array) -> pa.Array:
        missing = pa.nulls(len(chunk))
        data, file = (missing, chunk) if is_text else (chunk, missing)
        if _is_struct(kind):
            data, file = pc.struct_field(chunk, "bytes"), pc.struct_field(chunk, "path")
        return pa.StructArray.from_arrays([data.cast(pa.binary()), file.cast(pa.string())], ["bytes", "path"])

    return pa.chunked_array([struct(chunk) for chunk in column.chunks], type=CELL_TYPE)
