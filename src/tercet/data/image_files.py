"""Labeled images in folders, Parquet files or on the hub."""

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Value
from huggingface_hub.constants import HF_HUB_CACHE

from tercet.data import columns as cols
from tercet.data.columns import Chunk
from tercet.data.data_path import DataPath, resolve
from tercet.errors import InputError, require
from tercet.images import SUFFIXES, UnreadableImage, open_image, read_image_cell
from tercet.messages import warn_once
from tercet.paths import locate, locate_inside, visible_files

IMAGE_NAMES = ("image", "img", "picture", "photo", "face", "pixels")
LABEL_NAMES = ("label", "identity", "person", "class", "target", "category", "name")
SPLIT_NAMES = ("train", "training", "val", "valid", "validation", "dev", "test", "testing")
ACCEPTED = "a folder root/label/file, .parquet files with an image column, or a hub id (owner/name)"
HASHED = 50_000  # images of a folder whose contents its fingerprint reads, at most
CELL = {"bytes": Value("binary"), "path": Value("string")}
CELL_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@dataclass(frozen=True)
class ImageFiles:
    """A folder ``root/label/file``, Parquet with an image column (bytes, or ``{bytes, path}``), or a hub data set.

    Files are read inside of the folder alone, of Parquet that of its file, where relative paths start; links are followed.

    ``image`` and ``label`` name the columns; None: found by their usual names, or as the only column that can hold images. In
    a folder the label is the name of the folder that a file is in; a file in ``root`` itself has none. If ``root`` holds only
    folders such as train, val and test, with the labels' folders in them, a label is one in all of them, and they are the
    column ``split``. ``where`` keeps rows by value: ``{"split": "train"}``.

    ``split`` names the images to take: "train", "test" or "validation", or "all". With ``held_out`` above 0, "test" has
    about that many images, at most a fifth, of whole labels chosen by a hash, so that no label is in both sides; "train"
    has the others, "all" both. With ``validation_rows`` about as many of the others, of whole labels too, are the ``split``
    "validation".

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
        schema, here = resolve_images(self.path).schema(), f"`path`={self.path}"
        names = schema.names
        image = cols.check_column(here, names, self.image, "image") if self.image else _first(names, IMAGE_NAMES)
        held = [field.name for field in schema if _is_bytes(field.type) or _is_struct(field.type)]
        image = image or (held[0] if len(held) == 1 else None)
        has = f"{here} has the columns {', '.join(names)}"
        require(image, f"{has}: say which holds images with `image`=...")
        label = cols.check_column(here, names, self.label, "label") if self.label else _first(names, LABEL_NAMES)
        for key in ("held_out", "validation_rows"):
            advice = f"Name that of the labels with `label`=..., or use `{key}`=0."
            count = getattr(self, key)
            require(label or not count, f"`{key}`={count} holds out whole labels, but {has}. {advice}")
        vars(self).update(image=image, label=label, where=cols.where_values(self.where, names, self.path))

    @property
    def provides(self) -> frozenset[str]:
        """What samplers, objectives and evaluators may need."""
        return frozenset({"all_rows"} | ({"label"} if self.label is not None else set()))

    def rows(self) -> Dataset:
        """``image`` as ``{"bytes", "path"}``, not decoded, and ``label`` with its names."""
        named = [name for name in (self.image, self.label, *(self.where or ())) if name is not None]
        tables = [chunk.table for chunk in resolve_images(self.path).chunks([], named)]
        table = pa.concat_tables(tables, promote_options="permissive")
        table = table.filter(pa.array(cols.where_mask(table, self.where or {}, self.path)))
        reason = f"`where`={self.where} keeps no row of" if self.where else "There is no image in"
        require(len(table), f"{reason} `path`={self.path}.")
        assert self.image is not None
        cells, features = {"image": _image_cells(table[self.image], self.path, self.image)}, {"image": CELL}
        if self.label is not None:
            cells["label"], names = cols.label_ids(table[self.label], self.path, self.label)
            features["label"] = ClassLabel(names=names) if names else Value("int64")
        by = table[self.label or self.image]  # without labels nothing is held out
        try:
            rows = cols.split_rows(pa.table(cells), by, self.split, self.held_out, self.path, self.validation_rows)
        except InputError:
            _check_readable(cells["image"], self.path)  # which is the first thing to mend
            raise
        return cols.as_dataset(rows, self.fingerprint(), features)

    def fingerprint(self) -> str:
        """Hash the files' contents and every option but where the files are."""
        return resolve_images(self.path).fingerprint(astuple(self)[1:])


class ImageFolder(NamedTuple):
    """The ``images`` below the folder ``root``, to be read as a ``DataPath`` is; with ``splits`` it holds a folder for each."""

    root: Path
    images: list[Path]
    splits: Sequence[str]

    def schema(self) -> pa.Schema:
        """The columns."""
        return pa.schema({"image": CELL_TYPE, "label": pa.string()} | ({"split": pa.string()} if self.splits else {}))

    def chunks(self, texts: Sequence[str], others: Sequence[str]) -> Iterator[Chunk]:
        """All images, and the names of the folders they are in."""
        folders = [file.parent.relative_to(self.root).parts for file in self.images]
        labels = ["/".join(names[1:] if self.splits else names) or None for names in folders]
        cells = [{"bytes": None, "path": os.path.abspath(file)} for file in self.images]
        columns = {"image": cells, "label": labels} | ({"split": [names[0] for names in folders]} if self.splits else {})
        yield Chunk(str(self.root), "row", range(len(cells)), pa.table(columns, self.schema()))

    def fingerprint(self, options: Sequence[Any]) -> str:
        """Hash the options, the images' names and sizes, and their contents; of a great many those of every n-th image."""
        images = (f"{file.relative_to(self.root)}{file.stat().st_size}" for file in self.images)
        contents = cols.files_fingerprint("images", self.images[:: -(-len(self.images) // HASHED)])
        return cols.text_fingerprint(cols.VERSION, repr((*options, "")), contents, *images)


def resolve_images(path: str) -> DataPath | ImageFolder:
    """Find the images that a path names."""
    here = locate(path)
    if here.is_dir():
        files = visible_files(here)
        images = [f for f in files if f.suffix.lower() in SUFFIXES]
        if images:
            if others := len(files) - len(images):
                warn_once(f"{path}: {others} of {len(files)} files are no images by their names; left out.")
            return ImageFolder(here, images, _find_splits(path, [file.relative_to(here).parts for file in images]))
        is_parquet = any(f.suffix.lower() == ".parquet" for f in files)
        require(is_parquet, f"`path`={path}: no image among {len(files)} files. `path` takes {ACCEPTED}.")
    data = resolve(path)
    is_readable = data.format.kind in ("parquet", "hub")
    require(is_readable, f"`path`={path} is of kind {data.format.kind}. For images `path` takes {ACCEPTED}.")
    return data


def _find_splits(path: str, images: list[tuple[str, ...]]) -> list[str]:
    """The splits that the folder of images ``split/label/file`` holds; none where it holds ``label/file``."""
    splits = sorted({parts[0] for parts in images if len(parts) > 1 and parts[0].lower() in SPLIT_NAMES})
    inside, others = ([p for p in images if (p[0] in splits) == is_inside] for is_inside in (True, False))
    if not others and any(len(parts) > 2 for parts in inside):
        warn_once(f"{path} holds the splits {', '.join(splits)}; all are read, unless `where` names some: {{split: train}}.")
        return splits
    labels = Counter(names[1:] for names in {parts[:-1] for parts in inside} if names[1:])
    for label, count in labels.most_common(1):
        both = f"the label {'/'.join(label)} is in {count} of {', '.join(splits)}, as in splits"
        advice = "Name one of the splits in `path`, or move what is beside them."
        require(count < 2, f"`path`={path}: {both}, but '{'/'.join(others[0])}' is beside these folders. {advice}")
    _warn_of_repeated_names(path, {"/".join(parts[:-1]) for parts in images if len(parts) > 2})
    return []


def _warn_of_repeated_names(path: str, labels: set[str]) -> None:
    """Say which labels ``parent/name`` have one name below several parents, as where the parents are splits."""
    parents = defaultdict(list)
    for label in sorted(labels):
        parents[label.rpartition("/")[2]].append(label)
    repeated = [same for same in parents.values() if len(same) > 1]
    if repeated:
        advice = "If the folders above are splits, name one of them in `path`, or call them train and test"
        warn_once(f"{path}: {' and '.join(repeated[0][:2])} are different labels, as {len(repeated)} such names. {advice}.")


def _first(available: Sequence[str], names: Sequence[str]) -> str | None:
    lower = {name.lower(): name for name in available}
    return next((lower[name] for name in names if name in lower), None)


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_struct(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and {"bytes", "path"} <= set(kind.names)


def _roots(path: str) -> list[str]:
    """The folders, without links, that hold all files of the data: its own, or the caches of the hub's data sets."""
    here = locate(path)
    caches = (datasets.config.HF_DATASETS_CACHE, datasets.config.DOWNLOADED_DATASETS_PATH, HF_HUB_CACHE)
    return [os.path.realpath(folder) for folder in ([here if here.is_dir() else here.parent] if here.exists() else caches)]


def _inside(data: pa.Array, files: pa.Array, roots: Sequence[str], path: str) -> pa.Array:
    """The paths of ``files``, relative ones from the first of ``roots`` on; ``InputError`` for one outside of all of them.

    Links are followed. Files beside which there is ``data`` are names only.
    """
    found = []
    for name, held in zip(files.to_pylist(), data.is_valid().to_pylist(), strict=True):
        place = name if name is None or held else locate_inside(name, roots)
        advice = "Copy the image there, or name in `path` a folder that holds both."
        fault = f"the image {name!r} is outside of {' and '.join(roots)}"
        require(place is not None or name is None, f"`path`={path}: {fault}. {advice}")
        found.append(place)
    return pa.array(found, pa.string())


def _check_readable(cells: pa.ChunkedArray, path: str) -> None:
    """Raise ``InputError`` where half of the images, or of the first 1000, or more cannot be decoded."""
    tried = cells.slice(0, 1000).to_pylist()
    faults = [f"{cell['path'] or f'image {i}'}: {fault}" for i, cell in enumerate(tried, 1) if (fault := _decoding_fault(cell))]
    many = f"`path`={path}: {len(faults)} of {len(tried)} images cannot be read, the first is {''.join(faults[:1])}"
    require(2 * len(faults) < len(tried), f"{many}. Replace or delete them.")


def _decoding_fault(cell: Any) -> str:
    try:
        open_image(read_image_cell(cell))
    except (UnreadableImage, OSError) as error:
        return str(error)
    return ""


def _image_cells(column: pa.ChunkedArray, path: str, name: str) -> pa.ChunkedArray:
    """Bytes, file names or structs as structs; chunk by chunk, since an array of bytes ends at 2 GB."""
    kind, roots = column.type, _roots(path)
    is_image = pa.types.is_string(kind) or _is_bytes(kind) or _is_struct(kind)
    require(is_image, f"`image`={name}: `path`={path} holds {kind} there; images are bytes or file names.")
    if _is_struct(kind):
        cells = [(pc.struct_field(chunk, "bytes"), pc.struct_field(chunk, "path")) for chunk in column.chunks]
    else:
        pairs = ((chunk, pa.nulls(len(chunk))) for chunk in column.chunks)
        cells = [(missing, chunk) if pa.types.is_string(kind) else (chunk, missing) for chunk, missing in pairs]
    arrays = [[data.cast(pa.binary()), _inside(data, file.cast(pa.string()), roots, path)] for data, file in cells]
    return pa.chunked_array([pa.StructArray.from_arrays(both, ["bytes", "path"]) for both in arrays], type=CELL_TYPE)
