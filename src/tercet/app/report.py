"""``report.html``: one run, or a comparison of runs, as a page that needs no network; ``templates`` holds its markup."""

import base64
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from omegaconf import DictConfig, OmegaConf

from tercet.app.record import KEYS_WITHOUT_EFFECT, stage_metrics
from tercet.app.run_files import Metrics, is_smaller_better, main_metric, read_curves, smaller_is_better
from tercet.evaluation.significance import prediction_interval
from tercet.paths import write_text

CURVES = (  # columns of metrics.csv, or how they begin; each that has two values or more is a chart
    "train/loss", "train/accuracy", "train/alignment", "train/uniformity", "train/active", "train/gradient_norm", "val/", "lr",
)  # fmt: skip
SPEED = ("sentences_per_second", "tokens_per_second", "images_per_second", "padding", "waiting", "memory_gb", "skipped")


class Result(NamedTuple):
    """The sentence at the top of a page; an ``unexpected`` ``note`` is printed in bold."""

    headline: str
    note: str = ""
    unexpected: bool = False


class Chart(NamedTuple):
    """A curve as SVG: ``points`` in a box of 300 x 130 units, and the labels of its axes."""

    name: str
    points: str
    x_range: tuple[str, str]
    y_range: tuple[str, str]


def write_report(output: Path, cfg: DictConfig, metrics: Metrics, shown: Sequence[Path] = ()) -> None:
    """Write the page of a run into its folder ``output``, after all other files; it has those of ``shown`` that are images."""
    before, after = (stage_metrics(metrics, stage) for stage in ("before", "test"))
    overrides = list(cfg.command or [])
    names = [name for name in after if name in before or not before]
    curves = sorted(read_curves(output).items())
    changes = {name: f"{after[name] - before[name]:+.4f}" for name in names if name in before}
    values = {
        "title": run_title(cfg),
        "subtitle": f"experiment {cfg.name}, run {output.name}, seed {cfg.seed}",
        "result": run_result(cfg, metrics, before, after),
        "metrics": [(n, format_number(before.get(n)), format_number(after[n]), changes.get(n, "")) for n in names],
        "charts": [make_chart(name, points) for name, points in curves if name.startswith(CURVES) and len(points) > 1],
        "figures": _encode_images(sorted(path for path in shown if path.suffix == ".png")),
        "overrides": [override.partition("=")[::2] for override in overrides],
        "speed": [(n.replace("_", " "), format_number(metrics[f"train/{n}"])) for n in SPEED if f"train/{n}" in metrics],
        "revision": (output / "revision.txt").read_text(encoding="utf-8"),
        "command": shlex.join(["tercet", "train", *overrides]),
        "config": OmegaConf.to_yaml(cfg, resolve=True),
    }
    write_text(output / "report.html", render("run.html.j2", values))


def write_comparison_page(folder: Path, title: str, headline: str, tables: str, figure: Path) -> None:
    """Write the page of ``tercet compare``: its headline, its tables as text, and its figure."""
    values = {"title": title, "subtitle": str(folder), "result": Result(headline) if headline else None, "tables": tables}
    write_text(folder / "report.html", render("comparison.html.j2", values | {"figures": _encode_images([figure])}))


def render(template: str, values: Mapping[str, Any], autoescape: bool = True) -> str:
    """A template of the folder ``templates``, filled; ``autoescape`` is for HTML."""
    loader = FileSystemLoader(Path(__file__).with_name("templates"))
    lines: Any = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    environment = Environment(loader=loader, autoescape=autoescape, undefined=StrictUndefined, **lines)
    return environment.get_template(template).render(values)


def run_title(cfg: DictConfig) -> str:
    """What the run is about: the experiment or name that was given, else the file or the data set."""
    given = dict(str(override).lstrip("+").partition("=")[::2] for override in cfg.command or [])
    if given.get("experiment", "own_texts") != "own_texts" or "name" in given:  # own_texts is added by the command line
        return str(cfg.name)
    if "data.path" in given:
        return Path(str(cfg.data.path)).name
    return str(cfg.data.name) if "data" in given else str(cfg.name)


def run_result(cfg: DictConfig, metrics: Metrics, before: Metrics, after: Metrics) -> Result:
    """The main metric before and after training, compared with ``expected`` where the experiment runs unchanged.

    The metric is ``main_metric``.
    """
    main = main_metric(cfg, metrics)
    if main is None:
        return Result("No test metric was measured.")
    name, value = main.removeprefix("test/"), metrics[main]
    start = f"{format_number(before[name])} → " if name in before else ""
    loss = (before.get(name, value) - value) * (-1 if is_smaller_better(name, smaller_is_better(cfg)) else 1)
    same = bool(before) and all(after.get(measured) == x for measured, x in before.items())
    unchanged = "Nothing beat the model that training started from, which is kept: " if same and cfg.monitor else ""
    headline = f"{'Worse than before training: ' if loss > 0 else unchanged}{name}: {start}{format_number(value)}"
    without_effect = (*KEYS_WITHOUT_EFFECT, "experiment", "seed", "sweep")
    if main not in cfg.expected or not all(o.lstrip("+").startswith(without_effect) for o in cfg.command or []):
        return Result(headline)
    notes, unexpected = [], False
    for mean, sd, count, source in cfg.expected[main]:
        if sd is None:  # how far runs differ is not known
            notes.append(f"{source}: {format_number(mean)}{f' over {count} seeds' if count > 1 else ''}.")
            continue
        low, high = prediction_interval(mean, sd, count)
        outside = not low <= value <= high
        further = f"95 % of further runs lie between {format_number(low)} and {format_number(high)}"
        verdict = f"{'not ' if outside else ''}as expected"
        notes.append(f"{source}: {format_number(mean)} ± {format_number(sd)} over {count} seeds; {further}: {verdict}.")
        unexpected |= outside
    return Result(f"{headline}.", " ".join(notes), unexpected)


def _encode_images(paths: Sequence[Path]) -> dict[str, str]:
    return {path.stem: base64.b64encode(path.read_bytes()).decode() for path in paths}


def make_chart(name: str, points: Sequence[tuple[float, float]]) -> Chart:
    """Scale (step, value) pairs to the box between (46, 10) and (296, 110)."""
    xs, ys = zip(*points, strict=True)
    width, height = (max(xs) - min(xs)) or 1, (max(ys) - min(ys)) or 1
    scaled = " ".join(f"{46 + 250 * (x - min(xs)) / width:.1f},{110 - 100 * (y - min(ys)) / height:.1f}" for x, y in points)
    x_range, y_range = (f"{min(xs):.0f}", f"{max(xs):.0f}"), (format_number(min(ys)), format_number(max(ys)))
    return Chart(name, scaled, x_range, y_range)


def format_number(value: float | None) -> str:
    """A number with four decimals, or two significant digits below 0.001; whole from 1,000; nothing for None.

    >>> format_number(0.51234), format_number(0.000123), format_number(12345.6), format_number(None)
    ('0.5123', '0.00012', '12,346', '')
    """
    if value is None:
        return ""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4f}" if abs(value) >= 0.001 else f"{value:.2g}"


def before_after_table(before: Metrics, after: Metrics) -> str:
    """Metrics before and after training, as text for the terminal; names come without their stage."""
    names = [name for name in after if name in before or not before]
    width = max(map(len, names), default=0)
    head = f"{'':{width}}  {'before':>9}      {'after':>9}"
    cells = {name: "" if before.get(name) is None else f"{before[name]:.4f}" for name in names}
    return "\n".join([head, *(f"{name:{width}}  {cells[name]:>9}  →  {after[name]:>10.4f}" for name in names)])
