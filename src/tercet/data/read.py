"""A place to its columns and its pieces, whatever its kind."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tercet.data.choice import known
from tercet.data.hub import open_hub, read_hub
from tercet.data.piece import Piece, broken
from tercet.data.place import Place
from tercet.data.plain import check_bytes, read_text
from tercet.data.tables import csv_reader, json_objects, read_csv, read_json, read_parquet


def column_names(place: Place, file: int = 0) -> list[str]:
    """The columns, from the head of one file alone; of JSON those of its first objects."""
    if place.kind == "hub":
        return list(open_hub(place.path, streaming=True).column_names)
    path, name = place.files[file], _name(place, file)
    if path.stat().st_size == 0:
        raise broken(name, "the file is empty.")
    if place.kind == "txt":
        check_bytes(path, name, blocks=1)
        return ["text"]
    names = _table_columns(place.kind, path, name)
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise broken(name, f"the column {', '.join(twice)} is there twice. Rename one of them.")
    return names


def pieces(place: Place, texts: Sequence[str], others: Sequence[str], streaming: bool) -> Iterator[Piece]:
    """The text columns and the ``others`` of all files, in order."""
    columns = list(dict.fromkeys((*texts, *others)))
    if place.kind == "hub":
        yield from read_hub(place.path, columns, streaming)
        return
    for i, file in enumerate(place.files):
        name, available = _name(place, i), column_names(place, i)
        if place.kind != "json":  # an object may lack a column: that is an empty cell
            for column in columns:
                known(name.removeprefix("data.path="), available, column, "data.columns")
        if place.kind == "txt":
            yield from read_text(file, name)
        elif place.kind == "json":
            yield from read_json(file, name, columns, texts)
        elif place.kind == "parquet":
            yield from read_parquet(file, name, columns)
        else:
            yield from read_csv(file, name, place.kind, columns)


def _name(place: Place, file: int) -> str:
    path = place.files[file]
    inside = "" if len(place.files) == 1 else f", file {path.name}"
    return f"data.path={place.path}{inside}"


def _table_columns(kind: str, path: Path, name: str) -> list[str]:
    if kind == "parquet":
        try:
            return list(pq.read_schema(path).names)
        except (pa.ArrowException, OSError) as error:
            raise broken(name, f"cut or not Parquet ({error}). Copy or write it anew.") from error
    if kind == "json":
        blocks = json_objects(path, name)
        return list(dict.fromkeys(key for _, _, rows in itertools.islice(blocks, 1) for row in rows for key in row))
    names = list(csv_reader(path, name, kind).schema.names)
    if len(names) == 1 and (found := [mark for mark in (";", "\t", "|", ",") if mark in names[0]]):
        raise broken(
            name,
            f"line 1, {names[0]!r}, seems to be cut by {found[0]!r}. A .csv file is cut by commas, a .tsv file by tabs.",
        )
    return names
