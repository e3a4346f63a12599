"""What a user should know, said once."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

_failed: set[str] = set()


@cache
def say_once(message: str) -> None:
    """Log a warning; rows are read and evaluators run many times, the same message is not repeated."""
    logging.getLogger("tercet").warning(message)


def told(logger: Any) -> str:
    """What is said of a logger: which it is, and where it writes."""
    return f"{type(logger).__name__} in {logger.save_dir}"


@contextmanager
def enduring(what: str, kind: type[Exception] = OSError) -> Iterator[None]:
    """An error of this kind in here ends no run: the first of ``what`` is said, and it goes on."""
    try:
        yield
    except kind as error:
        if what not in _failed:
            _failed.add(what)
            logging.getLogger("tercet").warning(f"{what}: {type(error).__name__}: {error}; the run goes on without it.")
