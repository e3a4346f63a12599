"""A data set of the Hugging Face hub."""

from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from tercet.data.hub_file import reach
from tercet.data.piece import ROWS, Piece
from tercet.data.place import ACCEPTED
from tercet.error import InputError


def open_hub(path: str, streaming: bool) -> Any:
    """``owner/name[:config[:split]]``, split ``train`` unless named.

    Raises:
        InputError: the hub cannot be reached or has no such data set, config or split.
    """
    name, config, split = (*path.split(":"), None, None)[:3]
    if not datasets.config.HF_HUB_OFFLINE:
        reach(path, str(name))
    try:
        return datasets.load_dataset(name, config, split=split or "train", streaming=streaming)
    except Exception as error:  # the libraries below raise dozens of kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"data.path={path}: no such file or folder here, and the hub gave none: {reason} "
            f"data.path takes {ACCEPTED}; a hub id may go on with :config and :split."
        ) from error


def read_hub(path: str, columns: Sequence[str], streaming: bool) -> Iterator[Piece]:
    """The named columns of the data set."""
    start = 1
    rows = open_hub(path, streaming).select_columns(list(columns)).with_format("arrow")
    for table in rows.iter(ROWS):
        numbers = pa.array(np.arange(start, start + len(table), dtype=np.int64))
        yield Piece(f"data.path={path}", "row", numbers, table)
        start += len(table)
