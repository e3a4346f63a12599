"""``report.html``: a run, or a comparison of runs, on one page that needs no network."""

import base64
import csv
import shlex
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from tercet.app.record import KEYS_WITHOUT_EFFECT

STYLE = """
:root { color-scheme: light dark; --ink: #1d2326; --soft: #5d6a70; --line: #d9dfe1; --paper: #fff; --mark: #1b7f79 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6ebec; --soft: #9aa8ad; --line: #3a4347; --paper: #15191b; --mark: #5cc4bc } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 62rem;
  margin: 0 auto; padding: 1.5rem 1rem 4rem }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem } p.sub { color: var(--soft); margin: 0 }
.verdict { font-size: 1.15rem; border-left: 4px solid var(--mark); padding: .3rem 0 .3rem .9rem; margin: 1.2rem 0 }
.scroll { overflow-x: auto } table { border-collapse: collapse } td, th { padding: .2rem .9rem .2rem 0; text-align: left;
  border-bottom: 1px solid var(--line); white-space: nowrap }
th + th, td.n { text-align: right; font-variant-numeric: tabular-nums }
pre { background: color-mix(in srgb, var(--soft) 12%, transparent); padding: .7rem; overflow-x: auto; font-size: .85rem }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1rem }
figure { margin: 0 } figcaption { font-size: .85rem; color: var(--soft) } svg { width: 100%; height: auto; display: block }
img { max-width: 100%; background: #fff } polyline { fill: none; stroke: var(--mark); stroke-width: 1.5 }
svg text { font-size: 10px; fill: var(--soft) } svg line { stroke: var(--line) }
@media (max-width: 34rem) { table { font-size: .85rem } td, th { padding-right: .6rem }
  td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 6rem } }
"""
CURVES = (
    "train/loss",
    "train/accuracy",
    "train/alignment",
    "train/uniformity",
    "train/active",
    "train/gradient_norm",
    "val/",
    "lr",
)
SPEED = ("sentences_per_second", "tokens_per_second", "images_per_second", "padding", "waiting", "memory_gb", "skipped")


def write_report(
    output: Path, cfg: DictConfig, metrics: dict[str, float], before: dict[str, float], after: dict[str, float]
) -> None:
    """Of a run's folder, all of its files written."""
    names = [name for name in after if name in before or not before]
    rows = [(name, number(before.get(name)), number(after[name]), _change(before.get(name), after[name])) for name in names]
    typed = list(cfg.command or [])
    speed = [(name.replace("_", " "), number(metrics[f"train/{name}"])) for name in SPEED if f"train/{name}" in metrics]
    parts = [
        section("Before and after", table(("", "before", "after", "change"), rows)),
        section("Curves", curves(output / "metrics.csv")),
        section("Figures", pictures(sorted(output.glob("*.png")))),
        section("What was set", table(("key", "value"), [tuple(o.partition("=")[::2]) for o in typed])),
        section("Speed, at the end of training", table(("", ""), speed)),
        section("Surroundings", f"<pre>{escape((output / 'revision.txt').read_text(encoding='utf-8'))}</pre>"),
        section("The command that repeats it", f"<pre>{escape(shlex.join(['python', 'train.py', *typed]))}</pre>"),
        f"<details><summary>All settings</summary><pre>{escape(OmegaConf.to_yaml(cfg, resolve=True))}</pre></details>",
    ]  # fmt: skip
    page(
        output / "report.html",
        str(cfg.name),
        f"run {output.name}, seed {cfg.seed}",
        verdict(cfg, metrics, before, after),
        parts,
    )


def verdict(cfg: DictConfig, metrics: dict[str, float], before: dict[str, float], after: dict[str, float]) -> str:
    """The metric that counts, from before to after, and against what the experiment is known to reach."""
    expected = {name: list(value) for name, value in cfg.expected.items()}
    wanted = (*expected, cfg.optimized_metric, *(f"test/{n}" for n in after))
    first = next((name for name in wanted if name in metrics), None)
    if first is None:
        return "No test metric was measured."
    name = first.removeprefix("test/")
    start = f"{number(before[name])} → " if name in before else ""
    said = f"<b>{escape(name)}: {start}{number(metrics[first])}</b>"
    if first in expected and not _others(cfg):
        said += f". {_judged(metrics[first], *expected[first])}"
    return said


def _judged(value: float, mean: float, sd: float | None) -> str:
    """Against ``expected``; one number of a paper has no sd, and is only named."""
    if sd is None:
        return f"The paper has {number(mean)}."
    fits = abs(value - mean) <= 3 * sd
    return f"Expected {number(mean)} ± {number(sd)} over seeds: {'as expected.' if fits else '<b>not as expected</b>.'}"


def _others(cfg: DictConfig) -> list[str]:
    """What was typed beside the experiment, and what changes no result."""
    free = (*KEYS_WITHOUT_EFFECT, "experiment", "seed", "sweep")
    return [o for o in cfg.command or [] if not o.lstrip("+").startswith(free)]


def write_comparison_page(folder: Path, title: str, said: str, text: str, picture: Path) -> None:
    """Of ``tercet compare``."""
    parts = [section("Settings", f"<pre>{escape(text)}</pre>"), section("All runs", pictures([picture]))]
    page(folder / "report.html", title, str(folder), f"<b>{escape(said)}</b>", parts)


def page(path: Path, title: str, subtitle: str, verdict: str, parts: Iterable[str]) -> None:
    """Write it; an empty part is left out."""
    path.write_text(
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><h1>{escape(title)}</h1>"
        f'<p class="sub">{escape(subtitle)}</p><p class="verdict">{verdict}</p>{"".join(parts)}</body></html>\n',
        encoding="utf-8",
    )


def section(title: str, content: str) -> str:
    """A heading and what is below it; nothing of nothing."""
    return f"<h2>{escape(title)}</h2>{content}" if content else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Numbers stand on the right."""
    if not rows:
        return ""
    lines = (
        [f"<td>{escape(name).replace('/', '/<wbr>')}</td>", *(f"<td class=n>{escape(cell)}</td>" for cell in values)]
        for name, *values in rows
    )  # <wbr>: where a phone may break the name
    cells = "".join(f"<tr>{''.join(line)}</tr>" for line in lines)
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    return f'<div class="scroll"><table><tr>{top}</tr>{cells}</table></div>'


def pictures(paths: Sequence[Path]) -> str:
    """Inside the page."""
    coded = ((p.stem, base64.b64encode(p.read_bytes()).decode()) for p in paths)
    return "".join(f'<figure><img alt="{escape(n)}" src="data:image/png;base64,{c}"></figure>' for n, c in coded)


def curves(path: Path) -> str:
    """Of ``metrics.csv``; nothing where there is none."""
    if not path.is_file():
        return ""
    found: dict[str, list[tuple[float, float]]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value and row.get("step") and name.startswith(CURVES):
                    found.setdefault(name, []).append((float(row["step"]), float(value)))
    charts = [chart(name, points) for name, points in sorted(found.items()) if len(points) > 1]
    return f'<div class="charts">{"".join(charts)}</div>' if charts else ""


def chart(name: str, points: Sequence[tuple[float, float]]) -> str:
    """One line, its least and most, its first and last step."""
    xs, ys = zip(*points, strict=True)
    wide, high = (max(xs) - min(xs)) or 1, (max(ys) - min(ys)) or 1
    line = " ".join(f"{46 + 250 * (x - min(xs)) / wide:.1f},{110 - 100 * (y - min(ys)) / high:.1f}" for x, y in points)
    labels = [
        (2, 14, number(max(ys))),
        (2, 112, number(min(ys))),
        (46, 126, f"{min(xs):.0f}"),
        (270, 126, f"{max(xs):.0f}"),
    ]
    text = "".join(f'<text x="{x}" y="{y}">{escape(label)}</text>' for x, y, label in labels)
    frame = '<line x1="46" y1="110" x2="296" y2="110"/><line x1="46" y1="10" x2="46" y2="110"/>'
    return (
        f'<figure><svg viewBox="0 0 300 130">{frame}<polyline points="{line}"/>{text}</svg>'
        f"<figcaption>{escape(name)}</figcaption></figure>"
    )


def number(value: Any) -> str:
    """Four digits that count."""
    if value is None:
        return ""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4f}" if abs(value) >= 0.001 else f"{value:.2g}"


def _change(before: float | None, after: float) -> str:
    return "" if before is None else f"{after - before:+.4f}"


def before_after_table(before: dict[str, float], after: dict[str, float]) -> str:
    """The table *before → after*: metrics without their stage."""
    names = [name for name in after if name in before or not before]
    width = max(map(len, names), default=0)
    head = f"{'':{width}}  {'before':>9}      {'after':>9}"
    rows = [f"{n:{width}}  {_four_digits(before.get(n)):>9}  →  {_four_digits(after[n]):>10}" for n in names]
    return "\n".join([head, *rows])


def _four_digits(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
