"""Labels, positions and the values that ``where`` keeps."""

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from tercet.error import InputError


def label_ids(column: Any, path: str, name: str) -> tuple[pa.Array, list[str]]:
    """Each value's place among the sorted values, as int64, and those values; null and "" become -1.

    Strings that are all whole numbers are sorted as numbers.

    Raises:
        InputError: the values are fractions, or neither text nor numbers.
    """
    column = _plain(column)
    if pa.types.is_string(column.type):
        column = pc.utf8_trim_whitespace(column)
        column = pc.if_else(pc.equal(column, ""), None, column)
        column = _try_cast(column, pa.int64()) or column
    elif pa.types.is_floating(column.type):
        column = whole(column, path, name, "data.label")
    elif pa.types.is_boolean(column.type) or pa.types.is_null(column.type):
        column = column.cast(pa.int64())
    if not (pa.types.is_integer(column.type) or pa.types.is_string(column.type)):
        raise InputError(f"data.label={name}: data.path={path} holds {column.type} there; labels are text or integers.")
    values = pc.unique(column).drop_null()
    values = values.take(pc.sort_indices(values))
    return pc.fill_null(pc.index_in(column, values), -1).cast(pa.int64()), [str(value) for value in values.to_pylist()]


def whole(column: Any, path: str, name: str, key: str) -> Any:
    """The column as int64, null as -1 where ``key`` is not the label's.

    Raises:
        InputError: a value is no whole number.
    """
    column = _plain(column)
    found = _try_cast(column, pa.int64())
    if found is None:
        example = next(value for value in column.to_pylist() if not _is_whole(value))
        raise InputError(f"{key}={name}: data.path={path} holds {example!r} there; whole numbers are accepted.")
    return found


def kept(column: Any, values: list[Any], path: str, name: str) -> Any:
    """True where the column has one of the values, which may be written as text."""
    column = _plain(column)
    try:
        wanted = pa.array([None if value is None else str(value) for value in values], pa.string()).cast(column.type)
    except pa.ArrowException as error:
        raise InputError(f"data.where={{{name}: {values}}}: data.path={path} holds {column.type} there.") from error
    return pc.is_in(column, value_set=wanted)


def _plain(column: Any) -> Any:
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(pa.string()) if pa.types.is_large_string(column.type) else column


def _try_cast(column: Any, to: pa.DataType) -> Any:
    try:
        return column.cast(to)
    except pa.ArrowInvalid:
        return None


def _is_whole(value: Any) -> bool:
    try:
        return value is None or float(value).is_integer()
    except (TypeError, ValueError):
        return False
