"""Face images and the pairs that are compared: tables, and the files of LFW."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from tercet.errors import InputError
from tercet.evaluation.task_data import PAIR_COLUMNS, READERS, find_input, read_table
from tercet.images import PixelFormat, UnreadableImage, read_image_cell
from tercet.paths import locate

PAIRS_ACCEPTED = f"LFW's pairs.txt, or a .parquet, .csv, .tsv or .jsonl file with the columns {', '.join(PAIR_COLUMNS)}"
TRUTH = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}  # 1 == True
Face = tuple[str, int]  # a person and the number of the image, from 1
Row = tuple[int, bool, Face, Face]  # fold, same, and the two images


@dataclass(frozen=True)
class FacePairs:
    """P pairs: ``fold (P,)``, ``same (P,)``, and the indices ``first``, ``second (P,)`` of their images in ``faces``."""

    fold: npt.NDArray[np.int64]
    same: npt.NDArray[np.bool_]
    first: npt.NDArray[np.int64]
    second: npt.NDArray[np.int64]
    faces: Sequence[Face]

    @staticmethod
    def from_rows(rows: Sequence[Row]) -> "FacePairs":
        """Collect the images, each once, in the order of the pairs."""
        faces = list(dict.fromkeys(face for _, _, *both in rows for face in both))
        index = {face: i for i, face in enumerate(faces)}
        columns = zip(*((fold, same, index[one], index[other]) for fold, same, one, other in rows), strict=True)
        fold, same, first, second = map(np.array, columns)
        return FacePairs(fold, same, first, second, faces)


def find_pairs_file(path: str | Path) -> Path:
    """Locate the file of pairs; raise ``InputError`` where nothing readable can be there."""
    return find_input(path, "pairs", PAIRS_ACCEPTED, (".txt", *READERS))


def read_face_pairs(path: str | Path, folds: Sequence[int] | None) -> FacePairs:
    """Read the pairs of the given folds, all of them where ``folds`` is None.

    ``InputError`` where the file cannot be read or contradicts itself, a fold is missing or lacks same or different pairs.
    """
    cells = _lfw_cells(path) if find_pairs_file(path).suffix.lower() == ".txt" else _table_cells(path)
    rows = [_row(row, f"`pairs`={path}, pair {number}") for number, row in enumerate(cells, start=1)]
    available = sorted({row[0] for row in rows})
    if lacking := sorted(set(folds or ()) - set(available)):
        raise InputError(f"`folds`={list(folds or ())}: `pairs`={path} has the folds {available}, not {lacking}.")
    rows = [row for row in rows if folds is None or row[0] in folds]
    kinds = {(row[0], row[1]) for row in rows}
    chosen = available if folds is None else sorted(folds)
    if len(chosen) < 2:
        raise InputError(
            f"`pairs`={path} has the folds {available}: a fold's threshold is chosen on the other folds, so 2 are "
            "needed at least (without `folds` all are taken)."
        )
    if poor := [fold for fold in chosen if len({(fold, True), (fold, False)} & kinds) < 2]:
        raise InputError(f"`pairs`={path}: fold {poor[0]} needs pairs of both kinds, same and different people.")
    return FacePairs.from_rows(rows)


def _lfw_cells(path: str | Path) -> Iterable[Sequence[Any]]:
    """LFW's format: first the numbers of folds (or one) and of pairs of a kind in each; per fold same, then different."""
    text = find_pairs_file(path).read_text(encoding="utf-8-sig")
    header, *lines = [line.split() for line in text.splitlines() if line.strip()] or [[]]
    if len(header) not in (1, 2) or not all(word.isdigit() and int(word) > 0 for word in header):
        raise InputError(
            f"`pairs`={path}: the first line is {' '.join(header)!r}. LFW's pairs.txt begins with two numbers, folds "
            "and pairs of each kind in a fold (10 300), or with the second alone."
        )
    folds, count = (1, int(header[0])) if len(header) == 1 else map(int, header)
    if len(lines) != 2 * folds * count:
        raise InputError(f"`pairs`={path} has {len(lines)} pairs; its first line promises {folds} x 2 x {count}.")
    for i, words in enumerate(lines):
        same = i // count % 2 == 0
        if len(words) != (3 if same else 4):
            form = "a same pair, 'name n1 n2'" if same else "a different pair, 'name1 n1 name2 n2'"
            raise InputError(f"`pairs`={path}, pair {i + 1}: {' '.join(words)!r}, where {form}, is expected.")
        yield i // (2 * count) + 1, same, *words[:2], words[0 if same else 2], words[-1]


def _table_cells(path: str | Path) -> Iterable[Sequence[Any]]:
    table = read_table(path, "pairs", PAIR_COLUMNS, PAIRS_ACCEPTED)
    if not len(table):
        raise InputError(f"`pairs`={path} has no pairs.")
    return zip(*(table[name].to_pylist() for name in PAIR_COLUMNS), strict=True)


def _row(row: Sequence[Any], where: str) -> Row:
    fold, same, one, image1, other, image2 = row
    truth = TRUTH.get(same.strip().lower() if isinstance(same, str) else same)
    try:
        if truth is None or not str(one or "").strip() or not str(other or "").strip():
            raise ValueError
        number, first, second = int(fold), (str(one), int(image1)), (str(other), int(image2))
    except (TypeError, ValueError):
        cells = ", ".join(f"{name}={cell!r}" for name, cell in zip(PAIR_COLUMNS, row, strict=True))
        raise InputError(
            f"{where}: {cells}. Folds and images are whole numbers, same is true or false, identities are names."
        ) from None
    if first == second or truth != (first[0] == second[0]):
        what = "an image with itself" if first == second else f"{one} and {other} as same={str(truth).lower()}"
        raise InputError(f"{where}: it compares {what}. Correct the file.")
    return number, truth, first, second


FACE_COLUMNS = ("identity", "image_no", "image")
SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".webp", ".bmp")
FACES_ACCEPTED = f"a .parquet file with the columns {', '.join(FACE_COLUMNS)}, or a folder with Name/Name_0001.jpg"
PROBE = PixelFormat(size=16, channels=1, mean=(0.0,), std=(1.0,))  # JPEG decodes fastest to a small size


def find_faces(path: str | Path) -> Path:
    """Locate the faces, a file or a folder; raise ``InputError`` where nothing readable can be there."""
    return place if (place := locate(str(path))).is_dir() else find_input(path, "path", FACES_ACCEPTED, (".parquet",))


def read_faces(path: str | Path, pairs: FacePairs) -> list[bytes]:
    """Read the content of every image of the pairs, in the order of ``pairs.faces``.

    ``InputError`` where one is missing, there twice, or unreadable: without its pairs the folds would not be the official ones.
    """
    place = find_faces(path)
    found = _read_folder(place, pairs.faces) if place.is_dir() else _read_images(place, path, pairs.faces)
    if missing := [face for face in pairs.faces if face not in found]:
        more = f", and {len(missing) - 1} more are" if len(missing) > 1 else " is"
        raise InputError(
            f"`path`={path}: {_describe(missing[0], pairs)}{more} missing. No pair is skipped: complete the images, or "
            "leave the fold out with `folds`."
        )
    try:
        for face in pairs.faces:
            PROBE.open(found[face])
    except UnreadableImage as error:
        raise InputError(
            f"`path`={path}: {_describe(face, pairs)} is unreadable: {error}. No pair is skipped: replace the image, "
            "or leave the fold out with `folds`."
        ) from error
    return [found[face] for face in pairs.faces]


def _describe(face: Face, pairs: FacePairs) -> str:
    index = pairs.faces.index(face)
    folds = sorted({int(fold) for fold in pairs.fold[(pairs.first == index) | (pairs.second == index)]})
    return f"image {face[1]} of {face[0]} (fold {', '.join(map(str, folds))})"


def _read_folder(root: Path, faces: Sequence[Face]) -> Mapping[Face, bytes]:
    found = {}
    for name, number in faces:
        stem = root / name / f"{name}_{number:04d}"
        file = next((f for suffix in SUFFIXES if (f := stem.with_name(stem.name + suffix)).is_file()), None)
        if file is not None:
            found[name, number] = file.read_bytes()
    return found


def _read_images(file: Path, path: str | Path, faces: Sequence[Face]) -> Mapping[Face, bytes]:
    """Some rows at a time, so that a table of a million faces is not held in memory for the few that the pairs name."""
    found: dict[Face, bytes] = {}
    wanted = set(faces)
    try:
        table = pq.ParquetFile(file)
        names = table.schema_arrow.names
        if lacking := [name for name in FACE_COLUMNS if name not in names]:
            raise InputError(
                f"`path`={path} has the columns {', '.join(names)}; {', '.join(lacking)} must be there. "
                f"It takes {FACES_ACCEPTED}."
            )
        for batch in table.iter_batches(4096, columns=list(FACE_COLUMNS)):
            for name, number, cell in zip(*(batch[column].to_pylist() for column in FACE_COLUMNS), strict=True):
                if (name, number) not in wanted or cell is None:
                    continue
                if (name, number) in found:
                    raise InputError(f"`path`={path} has image {number} of {name} twice. Correct the table.")
                try:
                    found[name, number] = read_image_cell(cell if isinstance(cell, dict) else {"bytes": cell, "path": None})
                except (OSError, TypeError) as error:
                    raise InputError(f"`path`={path}: image {number} of {name} cannot be read: {error}") from error
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"`path`={path} cannot be read: {' '.join(str(error).split())}") from error
    return found
