"""The error for input that cannot be used."""

import difflib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NoReturn

_PARAMETER = re.compile(r"`([A-Za-z_][\w.]*)`")


class InputError(ValueError):
    """Input that cannot be used: the message says what was got, where, what is accepted, and which parameter to change.

    A component names its own parameters, in backticks: ``InputError(f"`margin`={margin}: a number from 0 to 4 is needed.")``.
    ``str`` drops the backticks; ``message`` keeps them, for the application to put the full key there (``loss.margin``).

    >>> str(InputError("`margin`=9: a number from 0 to 4 is needed."))
    'margin=9: a number from 0 to 4 is needed.'
    """

    def __init__(self, message: str) -> None:
        super().__init__(_PARAMETER.sub(r"\1", message))
        self.message = message

    def rename(self, key_of: dict[str, str]) -> str:
        """The message with each parameter replaced by its key; parameters that are not in ``key_of`` keep their name."""
        return _PARAMETER.sub(lambda found: key_of.get(found[1], found[1]), self.message)

    def parameters(self) -> list[str]:
        """The parameters that the message names, in order."""
        return _PARAMETER.findall(self.message)


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise ``InputError`` unless ``value``, of the parameter ``name``, is one of ``choices``."""
    require(value in choices, f"`{name}`={value}: choose one of {', '.join(choices)}.")


def did_you_mean(name: object, choices: Sequence[str], quote: str = "") -> str:
    """A sentence that proposes the choice closest to ``name``, whatever their case, in ``quote``; "" if none is close.

    >>> did_you_mean("stsb", ["STS12", "STS-B"])
    ' Did you mean STS-B?'
    """
    lower = {choice.lower(): choice for choice in choices}
    near = difflib.get_close_matches(str(name).lower(), lower, n=1)
    return "".join(f" Did you mean {quote}{lower[match]}{quote}?" for match in near)


def require(condition: object, message: str) -> None:
    """Raise ``InputError(message)`` unless ``condition`` holds."""
    if not condition:
        raise InputError(message)


def import_extra(module: str, extra: str) -> Any:
    """Import a module of a library that comes with ``extra``; ``InputError`` with its pip line where it is not there.

    >>> import_extra("no_such_module", "search")
    Traceback (most recent call last):
    tercet.errors.InputError: no_such_module is not installed: pip install 'tercet[search]'.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise InputError(f"{error.name} is not installed: pip install 'tercet[{extra}]'.") from error


def refuse_arguments(message: str) -> NoReturn:
    """Raise ``InputError`` in place of ``argparse.ArgumentParser.error``, which exits with 2.

    >>> refuse_arguments("unrecognized arguments: --epochs")
    Traceback (most recent call last):
    tercet.errors.InputError: unrecognized arguments: --epochs. Settings are written key=value; `--help` lists the options.
    """
    raise InputError(f"{message}. Settings are written key=value; `--help` lists the options.")


@contextmanager
def refuse_damaged(what: str, fault: str = "cannot be read", advice: str = "Copy or write it anew.") -> Iterator[None]:
    """Raise ``InputError`` about the file or folder ``what`` in place of whatever a library raises while it reads it.

    >>> with refuse_damaged("x.json"):
    ...     {}["name"]
    Traceback (most recent call last):
    tercet.errors.InputError: x.json cannot be read (KeyError: 'name'). Copy or write it anew.
    """
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:  # libraries raise dozens of types
        reason = " ".join(str(error).split())[:500]
        raise InputError(f"{what} {fault} ({type(error).__name__}{f': {reason}' if reason else ''}). {advice}") from error
