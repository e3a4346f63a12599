"""What ``make benchmark`` runs: each a command of its own, one after the other. A quarter of an hour on one core."""

import subprocess
import sys
import time

COMMANDS = (
    ("benchmarks.training", "--steps", "4"),
    ("benchmarks.large", "--names", "tercet, recomputed", "sentence-transformers, cached, 32 rows"),
    ("benchmarks.mining", "--sizes", "256", "512"),
    ("benchmarks.encoding", "--sentences", "2000"),
    ("benchmarks.evaluation", "--share", "0.1"),
    ("benchmarks.startup", "--repeats", "1"),
    ("benchmarks.growth", "--kinds", "loss", "step", "--sizes", "1024", "2048", "4096"),
)


def main() -> None:
    """Stops at the first that fails."""
    for command in COMMANDS:
        start = time.perf_counter()
        print("\npython -m", *command, flush=True)
        done = subprocess.run([sys.executable, "-m", *command], check=False)
        print(f"{time.perf_counter() - start:.0f} seconds", flush=True)
        if done.returncode:
            raise SystemExit(done.returncode)


if __name__ == "__main__":
    main()
