"""``python -m tercet COMMAND [key=value ...]``: train, evaluate, compare and others."""

import sys

from tercet.app.cli import COMMANDS
from tercet.app.cli import main as run


def main() -> None:
    """The first word is the command, the rest are overrides."""
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command not in COMMANDS:
        lines = [f"  {name:10} {text}" for name, text in COMMANDS.items()]
        print("\n".join(["usage: python -m tercet COMMAND [key=value ...]", *lines]), file=sys.stderr)
        raise SystemExit(command not in ("", "-h", "--help"))
    sys.argv = [sys.argv[0], *sys.argv[2:]]
    run(command)


if __name__ == "__main__":
    main()
