"""A plan, not a measurement: what a step moves, holds and takes on W devices, from one device's measured times.

python -m benchmarks.scale --step 1.55 --rows 64 --pairs 8192 --link 1.25
"""

import argparse

from benchmarks.report import table

SCORE = 11.4 / 16384**2  # seconds of a score of InfoNCE, both directions of autograd, one core (benchmarks.growth)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Bytes, memory and time of a step on many devices.")
    parser.add_argument("--step", type=float, default=1.55, help="seconds of a step of --rows on one device")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--score", type=float, default=SCORE, help="seconds of one of the N x N scores")
    parser.add_argument("--pairs", type=int, default=8192, help="N, the global batch")
    parser.add_argument("--link", type=float, default=1.25, help="GB/s that a device sends while it receives as much")
    parser.add_argument("--weights", type=float, default=22.6e6)
    parser.add_argument("--columns", type=int, default=384, help="D")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 8, 64, 512])
    return parser.parse_args()


def plan(options: argparse.Namespace, world: int) -> dict[str, float | int]:
    """Of one device among ``world``; nothing overlaps, so that it is no less than what will be seen.

    A ring all-reduce sends 2 (W - 1) / W of the gradient. Keys of two views are gathered, (W - 1) / W of them, and
    their gradient is all-reduced.
    """
    share = (world - 1) / world
    keys = 2 * options.pairs * options.columns * 4
    sent = share * (2 * 4 * options.weights + keys + 2 * keys)
    compute = options.step * options.pairs / world / options.rows + options.score * options.pairs**2 / world
    moving = sent / (options.link * 1e9)
    alone = options.step * options.pairs / options.rows + options.score * options.pairs**2
    return {
        "devices": world,
        "rows_of_each": options.pairs // world,
        "sent_MB": sent / 1e6,
        "keys_MB": keys / 1e6,
        "compute_s": compute,
        "moving_s": moving,
        "speed_up": alone / (compute + moving),
        "efficiency": alone / (compute + moving) / world,
    }


def main() -> None:
    """Print the table."""
    options = arguments()
    print(table([plan(options, world) for world in options.devices]))


if __name__ == "__main__":
    main()
