"""A benchmark's rows as a table to read and as JSON to keep."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import linear_regression
from typing import Any

Row = dict[str, Any]
HIDDEN = ("cpu_spread", "goal")


def write(path: Path, rows: Sequence[Row], setting: Row) -> None:
    """Print the table, write the file."""
    print(table(rows))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"rows": list(rows), **setting}, indent=1) + "\n")
    print(f"Written to {path}.", flush=True)


def table(rows: Sequence[Row]) -> str:
    """Markdown; a goal stands behind the ratio that it is for."""
    names = list(dict.fromkeys(name for row in rows for name in row if name not in HIDDEN))
    lines = [f"| {' | '.join(name.replace('_', ' ') for name in names)} |", "|" + " --- |" * len(names)]
    lines += [f"| {' | '.join(_cell(row, name) for name in names)} |" for row in rows]
    return "\n".join(lines)


def exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """The e of N^e: the slope of a line through the logarithms of ``(N, value)``; None of fewer than two."""
    logs = [(math.log(n), math.log(value)) for n, value in points]
    return linear_regression(*zip(*logs, strict=True)).slope if len(logs) > 1 else None


def _cell(row: Row, name: str) -> str:
    value = row.get(name)
    if isinstance(value, list):
        return " to ".join(map(_number, value))
    goal = f" (goal {row['goal']:g})" if name == "ratio" and row.get("goal") else ""
    return _number(value) + goal


def _number(value: Any) -> str:
    if not isinstance(value, float):
        return "" if value is None else str(value)
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
