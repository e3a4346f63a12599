"""Queries and their documents from any source."""

from collections.abc import Sequence

from tercet.contract import Source
from tercet.error import InputError
from tercet.notice import say_once


def check_name(suite: str, name: str) -> None:
    """Raise ``InputError`` for a name that metrics cannot carry."""
    if not name or "/" in name:
        raise InputError(f"evaluation.name={name!r}: metrics are called {suite}/<name>/..., so a name without '/'.")


def check_source(suite: str, name: str, source: Source | None) -> None:
    """Raise ``InputError`` where there is nothing to read, or no usable name for the metrics."""
    check_name(suite, name)
    if source is None:
        raise InputError(
            f"{suite} of {name} needs held-out rows, but data={name} has none (data.test is null). "
            "Use other data, or another evaluation, such as evaluation@test=sts."
        )


def text_pairs(source: Source, name: str) -> tuple[list[str], list[str], list[int]]:
    """Queries, documents and labels (-1: none), row by row.

    The first two columns of the source. A source of one column has its texts halved at the middle word: the first
    half is the query, the second its document. That is no paraphrase, but it needs no label, and it moves with quality.
    Texts of fewer than 4 words cannot be halved; they are left out, counted and said.
    """
    rows = source.rows()
    columns = list(source.columns)
    label = [int(x) for x in rows["label"]] if "label" in rows.column_names else [-1] * len(rows)
    if len(columns) > 1:
        first, second = list(rows[columns[0]]), list(rows[columns[1]])
    else:
        words = [text.split() for text in rows[columns[0]]]
        long = [i for i, w in enumerate(words) if len(w) >= 4]
        if short := len(words) - len(long):
            say_once(f"{name}: {short} of {len(words)} held-out texts have fewer than 4 words and are left out.")
        first = [" ".join(words[i][: len(words[i]) // 2]) for i in long]
        second = [" ".join(words[i][len(words[i]) // 2 :]) for i in long]
        label = [label[i] for i in long]
    if len(first) < 2:
        raise InputError(
            f"{name}: {len(first)} held-out pairs, but a search needs at least 2. Set data.held_out higher."
        )
    return first, second, label


def numbered(texts: Sequence[str]) -> tuple[list[str], list[int]]:
    """The distinct texts in order, and each row's number among them."""
    place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    return list(place), [place[text] for text in texts]
