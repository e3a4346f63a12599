"""What the benchmarks read: STS-B's sentences where TERCET_DATA is, else Middle English verses from a package."""

import os
import random
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

from tercet.data import Bible


def sentences(count: int, seed: int = 0) -> list[str]:
    """``count`` different ones, drawn at random."""
    root = os.environ.get("TERCET_DATA")
    found = _sts(Path(root) / "sts.parquet") if root else _verses()
    if len(found) < count:
        raise SystemExit(f"{count} sentences are asked for, there are {len(found)}.")
    return random.Random(seed).sample(found, count)


def source() -> str:
    """Their name, for the report."""
    return "STS sentences" if os.environ.get("TERCET_DATA") else "Middle English verses"


def _sts(path: Path) -> list[str]:
    table = pq.read_table(path)
    first, second = (set(pc.unique(table[f"sentence{i}"]).to_pylist()) for i in (1, 2))
    return sorted(first | second)


def _verses() -> list[str]:
    rows = Bible(query="wyc", document="web", books="train", pairs=False).rows()
    return sorted(set(rows["text"]))
