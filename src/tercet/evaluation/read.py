"""A table of scored pairs or of labelled sentences, whatever its format."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from tercet.error import InputError
from tercet.paths import locate

COLUMNS = ("task", "subset", "split", "sentence1", "sentence2", "score")


def read_table(path: str, columns: Sequence[str] = COLUMNS, other: str = ", or hub") -> Any:
    """A pyarrow table with at least ``columns``; cells of a text format are text. ``other`` ends what is accepted.

    Raises:
        InputError: there is no such file, it cannot be read, or a column is missing.
    """
    accepted = f"a .parquet, .csv, .tsv or .jsonl file with the columns {', '.join(columns)}{other}"
    file = locate(path)
    if not file.is_file():
        what = "is a folder" if file.is_dir() else f"does not exist (looked for {file})"
        raise InputError(
            f"evaluation.path={path} {what}. It takes {accepted}; relative paths also start in TERCET_DATA."
        )
    reader = READERS.get(file.suffix.lower())
    if reader is None:
        raise InputError(f"evaluation.path={path} ends in {file.suffix!r}. It takes {accepted}.")
    try:
        table = reader(file)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"evaluation.path={path} cannot be read: {' '.join(str(error).split())}") from error
    if lacking := [name for name in columns if table.column_names.count(name) != 1]:
        raise InputError(
            f"evaluation.path={path} has the columns {', '.join(table.column_names)}; "
            f"{', '.join(lacking)} must be there once. It takes {accepted}."
        )
    return table


def _delimited(file: Path, mark: str) -> Any:
    """Every cell is text: the word "NA" is a sentence like any other."""
    return pyarrow.csv.read_csv(
        file,
        parse_options=pyarrow.csv.ParseOptions(delimiter=mark, newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys((*COLUMNS, "label"), pa.string()), strings_can_be_null=False
        ),
    )


READERS: dict[str, Callable[[Path], Any]] = {
    ".parquet": pq.read_table,
    ".csv": lambda file: _delimited(file, ","),
    ".tsv": lambda file: _delimited(file, "\t"),
    ".jsonl": pyarrow.json.read_json,
}
