"""``tercet COMMAND [key=value ...]``, also as ``python -m tercet``: train, evaluate, search and others."""

import importlib
import sys

from tercet import __version__
from tercet.errors import InputError, did_you_mean

ALONE = ("completion", "doctor")  # without Hydra: the one has to be fast, the other to work where a package is missing


def main() -> None:
    """Run the command that the first argument names, with the rest as its overrides."""
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in ALONE:
        try:
            raise SystemExit(importlib.import_module(f"tercet.app.commands.{command}").main(arguments))
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(1) from None
    if command in ("-V", "--version", "version"):
        print(f"tercet {__version__}")
        return
    from tercet.app import cli

    if command in cli.COMMANDS:
        cli.main(command, arguments)
    if command in ("-h", "--help", "help"):
        print(cli.help_by_task())
        return
    hint = did_you_mean(command, list(cli.COMMANDS))
    print(f"error: {command} is no command.{hint} `tercet --help` lists them.", file=sys.stderr)
    raise SystemExit(1)


if __name__ == "__main__":
    main()
