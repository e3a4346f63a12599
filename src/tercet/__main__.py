"""``tercet COMMAND [key=value ...]``, also as ``python -m tercet``: train, evaluate, compare and others."""

import sys

from tercet.app import cli


def main() -> None:
    """Run the command that the first argument names, with the rest as its overrides."""
    command, *overrides = sys.argv[1:] or [""]
    if command not in cli.COMMANDS:
        lines = [f"  {name:10} {text}" for name, text in cli.COMMANDS.items()]
        print("\n".join(["usage: tercet COMMAND [key=value ...]", *lines]), file=sys.stderr)
        raise SystemExit(command not in ("", "-h", "--help"))
    cli.main(command, overrides)


if __name__ == "__main__":
    main()
