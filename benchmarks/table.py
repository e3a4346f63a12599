"""What the measurements say: ratios, growth, and a table to read."""

from typing import Any

from benchmarks.duels import OURS
from benchmarks.report import exponent

Row = dict[str, Any]
LEAST = {"wall": 0.0, "cpu": 0.0, "peak": 1.0}  # a peak below a MiB is the allocator's, not the loss's


def ratios(rows: list[Row]) -> list[Row]:
    """The peer's median over ours, for each loss and size that both could do."""
    ours = {(row["loss"], row["n"]): row for row in rows if row["name"] == OURS}
    return [
        {
            "loss": row["loss"],
            "name": row["name"],
            "n": row["n"],
            **{
                q: row[q] / ours[row["loss"], row["n"]][q]
                for q, least in LEAST.items()
                if min(row[q], ours[row["loss"], row["n"]][q]) > least
            },
        }
        for row in rows
        if row["name"] != OURS and row["peak"] is not None
    ]


def growths(rows: list[Row]) -> list[Row]:
    """The exponent e of each one's N^e: the slope of a line through the logarithms."""
    found = []
    for loss, name in dict.fromkeys((row["loss"], row["name"]) for row in rows):
        own = [row for row in rows if (row["loss"], row["name"]) == (loss, name)]
        found.append({"loss": loss, "name": name, **{q: _exponent(own, q) for q in LEAST}})
    return found


def _exponent(rows: list[Row], quantity: str) -> float | None:
    least = LEAST[quantity]
    return exponent([(row["n"], row[quantity]) for row in rows if (row.get(quantity) or 0) > least])


def table(report: Row, ours: str) -> str:
    """Markdown: a row for each measurement, then the growth."""
    times = {(r["loss"], r["name"], r["n"]): r for r in report["ratios"]}
    lines = [
        "| loss | N | whose | wall s (least to most) | CPU s | peak MiB | ours faster, CPU | ours smaller |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in report["rows"]:
        label = f"{row['name']} {report['versions'][row['name']]}"
        if row["peak"] is None:
            lines.append(f"| {row['loss']} | {row['n']} | {label} | does not fit in {report['limit_gib']:g} GiB | | | | |")
            continue
        ratio = times.get((row["loss"], row["name"], row["n"]), {})
        against = " | ".join(f"{ratio[q]:.1f}x" if q in ratio else "" for q in ("cpu", "peak"))
        low, high = row["wall_spread"]
        seconds = f"{row['wall']:.3f} ({low:.3f} to {high:.3f}) | {row['cpu']:.3f}"
        lines.append(f"| {row['loss']} | {row['n']} | {label} | {seconds} | {row['peak']:.1f} | {against} |")
    lines += ["", "| loss | whose | CPU grows as | memory grows as |", "| --- | --- | --- | --- |"]
    for row in report["growth"]:
        powers = " | ".join("" if row[q] is None else f"N^{row[q]:.2f}" for q in ("cpu", "peak"))
        lines.append(f"| {row['loss']} | {row['name']} | {powers} |")
    return "\n".join(lines)
