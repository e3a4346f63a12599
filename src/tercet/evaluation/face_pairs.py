"""Which pairs of face images are compared, and in which fold: tables, and the text files of LFW."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from tercet.error import InputError
from tercet.paths import locate

COLUMNS = ("fold", "same", "identity1", "image1", "identity2", "image2")
ACCEPTED = f"LFW's pairs.txt, or a .parquet, .csv or .tsv file with the columns {', '.join(COLUMNS)}"
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
            f"evaluation.pairs={path} {what}. It takes {ACCEPTED}; relative paths also start in TERCET_DATA."
        )
    if file.suffix.lower() not in (".txt", ".parquet", ".csv", ".tsv"):
        raise InputError(f"evaluation.pairs={path} ends in {file.suffix!r}. It takes {ACCEPTED}.")
    return file


def read_pairs(path: str, folds: Sequence[int] | None) -> FacePairs:
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
        raise InputError(
            f"evaluation.folds={list(folds or ())}: evaluation.pairs={path} has the folds {there}, not {lacking}."
        )
    rows = [row for row in rows if folds is None or row[0] in folds]
    kinds = {(row[0], row[1]) for row in rows}
    chosen = there if folds is None else sorted(folds)
    if len(chosen) < 2:
        raise InputError(
            f"evaluation.pairs={path} has the folds {there}: a fold's threshold is chosen on the other folds, so 2 are "
            "needed at least (evaluation.folds=null takes all that are there)."
        )
    if poor := [fold for fold in chosen if len({(fold, True), (fold, False)} & kinds) < 2]:
        raise InputError(
            f"evaluation.pairs={path}: fold {poor[0]} needs pairs of both kinds, same and different people."
        )
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
                convert_options=pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(COLUMNS, pa.string())),
            )
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"evaluation.pairs={path} cannot be read: {' '.join(str(error).split())}") from error
    if lacking := [name for name in COLUMNS if table.column_names.count(name) != 1]:
        raise InputError(
            f"evaluation.pairs={path} has the columns {', '.join(table.column_names)}; {', '.join(lacking)} must be there "
            f"once. It takes {ACCEPTED}."
        )
    if not len(table):
        raise InputError(f"evaluation.pairs={path} has no pairs.")
    cells = zip(*(table[name].to_pylist() for name in COLUMNS), strict=True)
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
            f"{where}: {', '.join(f'{name}={cell!r}' for name, cell in zip(COLUMNS, row, strict=True))}. Folds and images are "
            "whole numbers, same is true or false, identities are names."
        ) from None
