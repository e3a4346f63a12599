"""The images of faces, from a table or from a folder as LFW has it."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tercet.error import InputError
from tercet.evaluation.face_pairs import Face, FacePairs
from tercet.image import BadImage, Pixels, content
from tercet.paths import locate

COLUMNS = ("identity", "image_no", "image")
ENDINGS = (".jpg", ".jpeg", ".png", ".JPG", ".webp", ".bmp")
ACCEPTED = f"a .parquet file with the columns {', '.join(COLUMNS)}, or a folder with Name/Name_0001.jpg"
PROBE = Pixels(size=16, channels=1, mean=(0.0,), std=(1.0,))  # JPEG decodes fastest when little is asked for


def faces_place(path: str) -> Path:
    """Where the faces are; raises ``InputError`` if nothing readable can be there."""
    place = locate(path)
    if not place.exists():
        raise InputError(
            f"evaluation.path={path} does not exist (looked for {place}). It takes {ACCEPTED}; relative paths also start in "
            "TERCET_DATA."
        )
    if place.is_file() and place.suffix.lower() != ".parquet":
        raise InputError(f"evaluation.path={path} ends in {place.suffix!r}. It takes {ACCEPTED}.")
    return place


def read_faces(path: str, pairs: FacePairs) -> list[bytes]:
    """The content of every image of the pairs, in the order of ``pairs.faces``.

    Raises:
        InputError: an image is missing, there twice, or unreadable: it is named with its fold. A pair is never left out,
            for then the folds would no longer be the official ones.
    """
    place = faces_place(path)
    found = _in_folder(place, pairs.faces) if place.is_dir() else _in_table(place, path, set(pairs.faces))
    if missing := [face for face in pairs.faces if face not in found]:
        more = f", and {len(missing) - 1} more are" if len(missing) > 1 else " is"
        raise InputError(
            f"evaluation.path={path}: {_said(missing[0], pairs)}{more} missing. No pair is skipped: complete the images, or "
            "leave the fold out with evaluation.folds."
        )
    for face in pairs.faces:
        if fault := _fault(found[face]):
            raise InputError(
                f"evaluation.path={path}: {_said(face, pairs)} is unreadable: {fault}. No pair is skipped: mend the image, "
                "or leave the fold out with evaluation.folds."
            )
    return [found[face] for face in pairs.faces]


def _fault(data: bytes) -> str | None:
    try:
        PROBE.open(data)
    except BadImage as error:
        return str(error)
    return None


def _said(face: Face, pairs: FacePairs) -> str:
    place = pairs.faces.index(face)
    folds = sorted({int(fold) for fold in pairs.fold[(pairs.first == place) | (pairs.second == place)]})
    return f"image {face[1]} of {face[0]} (fold {', '.join(map(str, folds))})"


def _in_folder(root: Path, faces: Sequence[Face]) -> Mapping[Face, bytes]:
    found = {}
    for name, number in faces:
        stem = root / name / f"{name}_{number:04d}"
        file = next((f for ending in ENDINGS if (f := stem.with_name(stem.name + ending)).is_file()), None)
        if file is not None:
            found[name, number] = file.read_bytes()
    return found


def _in_table(file: Path, path: str, wanted: set[Face]) -> Mapping[Face, bytes]:
    found: dict[Face, bytes] = {}
    for identity, number, cell in _cells(file, path):
        if (identity, number) in wanted and cell is not None:
            if (identity, number) in found:
                raise InputError(f"evaluation.path={path} has image {number} of {identity} twice. Mend the table.")
            try:
                found[identity, number] = content(cell if isinstance(cell, dict) else {"bytes": cell, "path": None})
            except (OSError, TypeError) as error:
                raise InputError(
                    f"evaluation.path={path}: image {number} of {identity} cannot be read: {error}"
                ) from error
    return found


def _cells(file: Path, path: str) -> Iterator[tuple[str, int, Any]]:
    """Some rows at a time: a table of a million faces is not held in memory for the few that the pairs name."""
    try:
        table = pq.ParquetFile(file)
        names = table.schema_arrow.names
        if lacking := [name for name in COLUMNS if name not in names]:
            raise InputError(
                f"evaluation.path={path} has the columns {', '.join(names)}; {', '.join(lacking)} must be there. "
                f"It takes {ACCEPTED}."
            )
        for batch in table.iter_batches(4096, columns=list(COLUMNS)):
            yield from zip(*(batch[name].to_pylist() for name in COLUMNS), strict=True)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"evaluation.path={path} cannot be read: {' '.join(str(error).split())}") from error
