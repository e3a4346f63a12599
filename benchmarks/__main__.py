"""What ``make benchmark`` runs: each a command of its own, one after the other. About ten minutes."""

import subprocess
import sys

COMMANDS = (["benchmarks.training"], ["benchmarks.mining", "--sizes", "256", "512", "1024"])


def main() -> None:
    """Stops at the first that fails."""
    for command in COMMANDS:
        print("python -m", *command, flush=True)
        done = subprocess.run([sys.executable, "-m", *command], check=False)
        if done.returncode:
            raise SystemExit(done.returncode)


if __name__ == "__main__":
    main()
