"""Which columns hold the text."""

import difflib
from collections.abc import Sequence

from tercet.error import InputError

# SimCSE's names for pairs and triplets, and Sentence Transformers'.
TUPLES = (("sent0", "sent1", "hard_neg"), ("anchor", "positive", "negative"))
SINGLES = ("text", "sentence")


def text_columns(path: str, available: Sequence[str], asked: Sequence[str] | None) -> tuple[str, ...]:
    """``asked`` if given; else a pair or triplet under its usual names, the only column, ``text`` or ``sentence``."""
    if asked is not None:
        return _asked(path, available, asked)
    for names in TUPLES:
        found = tuple(name for name in names if name in available)
        if found[:2] == names[:2]:
            return found
    if len(available) == 1:
        return (available[0],)
    for name in SINGLES:
        if name in available:
            return (name,)
    raise InputError(
        f"data.path={path} has the columns {', '.join(available)}: say which hold text, "
        f"for example data.columns=[{available[0]}]."
    )


def known(path: str, available: Sequence[str], name: str, key: str) -> str:
    """The column ``name``, if there is one; ``key`` is the configuration key that named it."""
    if name in available:
        return name
    lower = {column.lower(): column for column in available}
    close = difflib.get_close_matches(name.lower(), lower, n=1)
    hint = f" Did you mean '{lower[close[0]]}'?" if close else ""
    raise InputError(f"{key} names '{name}', but data.path={path} has the columns {', '.join(available)}.{hint}")


def _asked(path: str, available: Sequence[str], asked: Sequence[str]) -> tuple[str, ...]:
    if not asked or len(set(asked)) < len(asked):
        raise InputError(f"data.columns=[{', '.join(asked)}]: name one column or more, none of them twice.")
    return tuple(known(path, available, name, "data.columns") for name in asked)
