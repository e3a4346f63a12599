"""Face images and the pairs that are compared: tables, and the files of LFW."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from tercet.errors import InputError
from tercet.images import PixelFormat, UnreadableImage, read_image_cell
from tercet.paths import locate

PAIR_COLUMNS = ("fold", "same", "identity1", "image1", "identity2", "image2")
PAIRS_ACCEPTED = f"LFW's pairs.txt, or a .parquet, .csv or .tsv file with the columns {', '.join(PAIR_COLUMNS)}"
TRUTH = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}  # 1 == True
Face = tuple[str, int]  # a person and the number of the image, from 1
Row = tuple[int, bool, Face, Face]


@dataclass(frozen=True)
class FacePairs:
    """P pairs: ``fold (P,)``, ``same (P,)``, and the places ``first``, ``second (P,)`` of their images in ``faces``."""

    fold: npt.NDArray[np.int64]
    same: npt.NDArray[np.bool_]
    first: npt.NDArray[np.int64]
    second: npt.NDArray[np.int64]
    faces: Sequence[Face]

    @staticmethod
    def of(rows: Sequence[Row]) -> "FacePairs":
        """Each image once, in the order of the pairs."""
        faces = list(dict.fromkeys(face for _, _, one, other in rows for face in (one, other)))
        place = {face: i for i, face in enumerate(faces)}
        fold, same, first, second = (
            np.array(x) for x in zip(*((f, s, place[one], place[other]) for f, s, one, other in rows), strict=True)
        )
        return FacePairs(fold, same, first, second, faces)


def pairs_file(path: str) -> Path:
    """Where the pairs are; raises ``InputError`` if nothing readable can be there."""
    file = locate(path)
    if not file.is_file():
        what = "is a folder" if file.is_dir() else f"does not exist (looked for {file})"
        raise InputError(
            f"evaluation.pairs={path} {what}. It takes {PAIRS_ACCEPTED}; relative paths also start in TERCET_DATA."
        )
    if file.suffix.lower() not in (".txt", ".parquet", ".csv", ".tsv"):
        raise InputError(f"evaluation.pairs={path} ends in {file.suffix!r}. It takes {PAIRS_ACCEPTED}.")
    return file


def read_face_pairs(path: str, folds: Sequence[int] | None) -> FacePairs:
    """The pairs of the chosen folds, all of them where ``folds`` is None.

    Raises:
        InputError: the file cannot be read or contradicts itself, a fold is not there or lacks same or different pairs,
            or there is only one fold.
    """
    file = pairs_file(path)
    rows = _official(file, path) if file.suffix.lower() == ".txt" else _table(file, path)
    for number, (_, same, one, other) in enumerate(rows, start=1):
        if one == other or same != (one[0] == other[0]):
            what = "an image with itself" if one == other else f"{one[0]} and {other[0]} as same={str(same).lower()}"
            raise InputError(f"evaluation.pairs={path}, pair {number}: it compares {what}. Mend the file.")
    there = sorted({row[0] for row in rows})
    if lacking := sorted(set(folds or ()) - set(there)):
        raise InputError(f"evaluation.folds={list(folds or ())}: evaluation.pairs={path} has the folds {there}, not {lacking}.")
    rows = [row for row in rows if folds is None or row[0] in folds]
    kinds = {(row[0], row[1]) for row in rows}
    chosen = there if folds is None else sorted(folds)
    if len(chosen) < 2:
        raise InputError(
            f"evaluation.pairs={path} has the folds {there}: a fold's threshold is chosen on the other folds, so 2 are "
            "needed at least (evaluation.folds=null takes all that are there)."
        )
    if poor := [fold for fold in chosen if len({(fold, True), (fold, False)} & kinds) < 2]:
        raise InputError(f"evaluation.pairs={path}: fold {poor[0]} needs pairs of both kinds, same and different people.")
    return FacePairs.of(rows)


def _official(file: Path, path: str) -> list[Row]:
    """A header, folds and pairs of a kind in each (one number: a single fold); per fold the same pairs, then the others."""
    lines = [line.split() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    header = lines[0] if lines else []
    if len(header) not in (1, 2) or not all(word.isdigit() and int(word) > 0 for word in header):
        raise InputError(
            f"evaluation.pairs={path}: the first line is {' '.join(header)!r}. LFW's pairs.txt begins with two numbers, folds "
            "and pairs of each kind in a fold (10 300), or with the second alone."
        )
    folds, count = (1, int(header[0])) if len(header) == 1 else map(int, header)
    if len(lines) - 1 != 2 * folds * count:
        raise InputError(
            f"evaluation.pairs={path} has {len(lines) - 1} pairs; its first line promises {folds} x 2 x {count}. "
            "The file is cut, or the line is wrong."
        )
    return [_line(words, i, count, path) for i, words in enumerate(lines[1:])]


def _line(words: Sequence[str], i: int, count: int, path: str) -> Row:
    same = i // count % 2 == 0
    numbers = [words[1], words[2]] if same else [words[1], words[-1]] if len(words) == 4 else []
    if len(words) != (3 if same else 4) or not all(number.isdigit() for number in numbers):
        form = "a same pair, `name n1 n2`" if same else "a different pair, `name1 n1 name2 n2`"
        raise InputError(f"evaluation.pairs={path}, pair {i + 1}: {' '.join(words)!r} stands where {form}, is due.")
    other = words[0] if same else words[2]
    return i // (2 * count) + 1, same, (words[0], int(numbers[0])), (other, int(numbers[1]))


def _table(file: Path, path: str) -> list[Row]:
    mark = "\t" if file.suffix.lower() == ".tsv" else ","
    try:
        if file.suffix.lower() == ".parquet":
            table: Any = pq.read_table(file)
        else:
            table = pyarrow.csv.read_csv(
                file,
                parse_options=pyarrow.csv.ParseOptions(delimiter=mark),
                convert_options=pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(PAIR_COLUMNS, pa.string())),
            )
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"evaluation.pairs={path} cannot be read: {' '.join(str(error).split())}") from error
    if lacking := [name for name in PAIR_COLUMNS if table.column_names.count(name) != 1]:
        raise InputError(
            f"evaluation.pairs={path} has the columns {', '.join(table.column_names)}; {', '.join(lacking)} must be there "
            f"once. It takes {PAIRS_ACCEPTED}."
        )
    if not len(table):
        raise InputError(f"evaluation.pairs={path} has no pairs.")
    cells = zip(*(table[name].to_pylist() for name in PAIR_COLUMNS), strict=True)
    return [_row(row, f"evaluation.pairs={path}, row {number}") for number, row in enumerate(cells, start=1)]


def _row(row: Sequence[Any], where: str) -> Row:
    fold, same, one, image1, other, image2 = row
    truth = TRUTH.get(same.strip().lower() if isinstance(same, str) else same)
    try:
        if truth is None or not str(one or "").strip() or not str(other or "").strip():
            raise ValueError
        return int(fold), truth, (str(one), int(image1)), (str(other), int(image2))
    except (TypeError, ValueError):
        raise InputError(
            f"{where}: {', '.join(f'{name}={cell!r}' for name, cell in zip(PAIR_COLUMNS, row, strict=True))}. Folds and images are "
            "whole numbers, same is true or false, identities are names."
        ) from None


FACE_COLUMNS = ("identity", "image_no", "image")
ENDINGS = (".jpg", ".jpeg", ".png", ".JPG", ".webp", ".bmp")
FACES_ACCEPTED = f"a .parquet file with the columns {', '.join(FACE_COLUMNS)}, or a folder with Name/Name_0001.jpg"
PROBE = PixelFormat(size=16, channels=1, mean=(0.0,), std=(1.0,))  # JPEG decodes fastest when little is asked for


def faces_place(path: str) -> Path:
    """Where the faces are; raises ``InputError`` if nothing readable can be there."""
    place = locate(path)
    if not place.exists():
        raise InputError(
            f"evaluation.path={path} does not exist (looked for {place}). It takes {FACES_ACCEPTED}; relative paths also start in "
            "TERCET_DATA."
        )
    if place.is_file() and place.suffix.lower() != ".parquet":
        raise InputError(f"evaluation.path={path} ends in {place.suffix!r}. It takes {FACES_ACCEPTED}.")
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
    except UnreadableImage as error:
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
                found[identity, number] = read_image_cell(cell if isinstance(cell, dict) else {"bytes": cell, "path": None})
            except (OSError, TypeError) as error:
                raise InputError(f"evaluation.path={path}: image {number} of {identity} cannot be read: {error}") from error
    return found


def _cells(file: Path, path: str) -> Iterator[tuple[str, int, Any]]:
    """Some rows at a time: a table of a million faces is not held in memory for the few that the pairs name."""
    try:
        table = pq.ParquetFile(file)
        names = table.schema_arrow.names
        if lacking := [name for name in FACE_COLUMNS if name not in names]:
            raise InputError(
                f"evaluation.path={path} has the columns {', '.join(names)}; {', '.join(lacking)} must be there. "
                f"It takes {FACES_ACCEPTED}."
            )
        for batch in table.iter_batches(4096, columns=list(FACE_COLUMNS)):
            yield from zip(*(batch[name].to_pylist() for name in FACE_COLUMNS), strict=True)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"evaluation.path={path} cannot be read: {' '.join(str(error).split())}") from error
