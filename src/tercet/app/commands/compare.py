"""The command ``compare``: finished runs in one table, with the uncertainty of the differences between settings."""

import csv
import math
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from tercet.app import record, report
from tercet.errors import InputError
from tercet.messages import print_status
from tercet.paths import check_writable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

IGNORED_KEYS = (*record.KEYS_WITHOUT_EFFECT, "seed", "callback", "+", "~", "hydra")
LESS_IS_BETTER = ("alignment", "uniformity", "loss", "perplexity", "forgotten")  # metrics, by how their names end
MAX_RESAMPLES = 10_000

Setting = tuple[str, ...]  # a value for each axis


@dataclass(frozen=True)
class Run:
    """A finished run; ``overrides`` are the keys and values of its command, ``optimized`` its optimized metric."""

    folder: Path
    seed: int
    metrics: dict[str, float]
    overrides: dict[str, str]
    command: str
    optimized: str | None


@dataclass(frozen=True)
class Comparison:
    """Runs by setting; ``axes`` are the keys whose values differ between the runs' commands, except the seed."""

    axes: tuple[str, ...]
    runs: dict[Setting, list[Run]]

    def values(self, setting: Setting, metric: str) -> dict[int, float]:
        """The values of a metric, by seed."""
        return {run.seed: run.metrics[metric] for run in self.runs[setting] if metric in run.metrics}

    def rank(self, metric: str) -> list[Setting]:
        """The settings that have the metric, from the best mean to the worst."""
        measured = [setting for setting in self.runs if self.values(setting, metric)]
        sign = 1 if less_is_better(metric) else -1
        return sorted(measured, key=lambda setting: sign * statistics.fmean(self.values(setting, metric).values()))

    def metrics(self) -> list[str]:
        """The metrics of the test stage; only the optimized metric where all runs have the same one."""
        runs = [run for group in self.runs.values() for run in group]
        optimized = {run.optimized for run in runs}
        names = {name for run in runs for name in run.metrics if name.startswith("test/")}
        tests = sorted(names, key=lambda name: (less_is_better(name), name))
        return [name for name in optimized if name] if len(optimized) == 1 and optimized <= set(tests) else tests

    def label(self, setting: Setting, default: str, short: bool = False) -> str:
        """``key=value`` of each axis; a ``short`` label has the last word of each key; ``default`` without axes."""
        pairs = zip(self.axes, setting, strict=True)
        return " ".join(f"{axis.split('.')[-1] if short else axis}={value}" for axis, value in pairs) or default


def run(cfg: DictConfig, output: Path) -> None:
    """Compare the runs in the folders ``cfg.runs`` and write the files into ``cfg.output``, or the first of these folders."""
    paths = [Path(p) for p in ([cfg.runs] if isinstance(cfg.runs, str) else cfg.runs)]
    runs = read_runs(paths)
    target = Path(cfg.output) if cfg.output else paths[0]
    check_writable(target, "output")
    comparison = group_runs(runs)
    names = {name for one in runs for name in one.metrics}
    if cfg.metric and cfg.metric not in names:
        known = ", ".join(sorted(name for name in names if name.startswith("test/")))
        raise InputError(f"metric={cfg.metric} is in none of the runs. There are: {known}.")
    write_comparison(comparison, [cfg.metric] if cfg.metric else comparison.metrics(), target)


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """All finished runs in or below ``paths``; prints how many have no metrics and are left out."""
    for path in paths:
        if not path.is_dir():
            raise InputError(f"runs={path}: there is no such folder. Give run folders, or one that holds them.")
    folders = {file.parent for path in paths for file in path.rglob("config.yaml")}
    top = [folder for folder in folders if not folders & set(folder.parents)]  # the stages of a run are not runs
    runs = [_read_run(folder) for folder in sorted(top, key=_natural_order) if (folder / "metrics.json").is_file()]
    if unfinished := len(top) - len(runs):
        print_status(f"{unfinished} runs have not finished and are left out.")
    if not runs:
        raise InputError(f"runs={', '.join(map(str, paths))}: no finished run (config.yaml and metrics.json) is there.")
    return runs


def _natural_order(folder: Path) -> list[Any]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in folder.parts]


def _read_run(folder: Path) -> Run:
    cfg = OmegaConf.load(folder / "config.yaml")
    assert isinstance(cfg, DictConfig)
    given = list(cfg.get("command") or [])
    overrides = {key: value for key, _, value in (part.partition("=") for part in given)}
    command = shlex.join(["python", "train.py", *given])
    return Run(folder, int(cfg.seed), record.read_metrics(folder), overrides, command, cfg.get("optimized_metric"))


def group_runs(runs: Sequence[Run]) -> Comparison:
    """Group runs by the overrides that differ between them; ``-`` stands for a key that a command does not set."""
    keys = dict.fromkeys(key for one in runs for key in one.overrides if not key.startswith(IGNORED_KEYS))
    axes = tuple(key for key in keys if len({one.overrides.get(key) for one in runs}) > 1)
    groups: dict[Setting, list[Run]] = {}
    for one in runs:
        groups.setdefault(tuple(one.overrides.get(axis, "-") for axis in axes), []).append(one)
    return Comparison(axes, groups)


def less_is_better(metric: str) -> bool:
    """Whether a smaller value of the metric is the better one."""
    return metric.endswith(LESS_IS_BETTER)


def write_comparison(comparison: Comparison, metrics: Sequence[str], folder: Path) -> None:
    """Write ``comparison.txt`` (printed too), ``.csv`` (all metrics of all runs), ``.png`` and ``report.html``."""
    text = comparison_text(comparison, metrics)
    print_status("\n" + text)
    (folder / "comparison.txt").write_text(text + "\n", encoding="utf-8")
    with (folder / "comparison.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        names = sorted({name for runs in comparison.runs.values() for run in runs for name in run.metrics})
        writer.writerow([*comparison.axes, "seed", "folder", *names])
        for setting, runs in comparison.runs.items():
            for one in runs:
                writer.writerow([*setting, one.seed, one.folder, *(one.metrics.get(name, "") for name in names)])
    draw_comparison(comparison, metrics).savefig(folder / "comparison.png", dpi=150)
    title = f"{sum(map(len, comparison.runs.values()))} runs compared"
    headline = describe_best(comparison, metrics[0]) if metrics else ""
    report.write_comparison_page(folder, title, headline, text, folder / "comparison.png")
    print_status(f"Written to {folder}: report.html, comparison.txt, .csv, .png")


def comparison_text(comparison: Comparison, metrics: Sequence[str]) -> str:
    """The tables of all metrics as text, and the command of the best run by the first metric."""
    blocks = []
    for metric in metrics:
        blocks.append(ranking_table(comparison, metric))
        if len(comparison.axes) > 1 and (effects := axis_effects(comparison, metric)):
            blocks.append(effects)
    if metrics and (order := comparison.rank(metrics[0])):
        metric, pick = metrics[0], min if less_is_better(metrics[0]) else max
        best = pick((one for one in comparison.runs[order[0]] if metric in one.metrics), key=lambda one: one.metrics[metric])
        blocks.append(f"best run: {best.folder}, {metric} = {best.metrics[metric]:.4f}\n  {best.command}")
    return "\n\n".join(blocks)


def describe_best(comparison: Comparison, metric: str) -> str:
    """A sentence: the best setting, and by how much it is ahead of the second."""
    first, *others = comparison.rank(metric)
    best = comparison.values(first, metric)
    sentence = f"{comparison.label(first, 'all runs')}: {metric} {format_mean_sd(list(best.values()))}"
    if not others:
        return f"{sentence}."
    second = comparison.label(others[0], "all runs")
    differences = paired_differences(best, comparison.values(others[0], metric))
    if len(differences) < 2:
        return f"{sentence}, before {second} (no two seeds in common)."
    mean, low, high, _ = paired_bootstrap(differences)
    ahead = "ahead of" if low * high > 0 else "not surely ahead of"
    return f"{sentence}, {ahead} {second} by {mean:+.4f} [{low:+.4f}, {high:+.4f}]."


def ranking_table(comparison: Comparison, metric: str) -> str:
    """A row for each setting: mean ± sd over its seeds, and the lead of the best setting on the seeds that both have."""
    order = comparison.rank(metric)
    head = [*comparison.axes, "runs", "mean ± sd"]
    rows = [[*head, "lead of the best [95 %]", "resamples that agree"] if comparison.axes else head]
    for setting in order:
        values = comparison.values(setting, metric)
        row = [*setting, str(len(values)), format_mean_sd(list(values.values()))]
        if comparison.axes:
            row += ["", ""] if setting == order[0] else _lead(comparison.values(order[0], metric), values)
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([f"{metric}, {'less' if less_is_better(metric) else 'more'} is better", *lines])


def _lead(best: dict[int, float], other: dict[int, float]) -> list[str]:
    differences = paired_differences(best, other)
    if len(differences) < 2:
        return ["no two seeds in common", ""]
    mean, low, high, share = paired_bootstrap(differences)
    return [f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]", f"{max(share, 1 - share):.0%}"]


def paired_differences(best: dict[int, float], other: dict[int, float]) -> list[float]:
    """``best - other`` for each seed that both have."""
    return [best[seed] - other[seed] for seed in sorted(best.keys() & other.keys())]


def paired_bootstrap(differences: Sequence[float]) -> tuple[float, float, float, float]:
    """The mean difference over seeds, its 95 % interval, and the share of resamples with a mean above 0.

    Seeds are resampled with replacement (Efron and Tibshirani 1993, chapter 13): all ``n^n`` resamples if these are at
    most ``MAX_RESAMPLES``, else that many at random. With three seeds an interval without 0 means only that all three agree.

    >>> [round(x, 3) for x in paired_bootstrap([0.1, 0.2, 0.3])]
    [0.2, 0.122, 0.278, 1.0]
    """
    import numpy as np

    d, n = np.asarray(differences), len(differences)
    if n**n <= MAX_RESAMPLES:
        picks = np.stack(np.meshgrid(*[np.arange(n)] * n), -1).reshape(-1, n)
    else:
        picks = np.random.default_rng(0).integers(0, n, (MAX_RESAMPLES, n))
    means = d[picks].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(d.mean()), float(low), float(high), float((means > 0).mean() + (means == 0).mean() / 2)


def axis_effects(comparison: Comparison, metric: str) -> str:
    """For each axis: the mean at each of its values, and its share of the variance between runs (eta squared)."""
    values = {setting: list(comparison.values(setting, metric).values()) for setting in comparison.rank(metric)}
    pooled = [x for group in values.values() for x in group]
    total = sum((x - statistics.fmean(pooled)) ** 2 for x in pooled)
    lines = []
    for i, axis in enumerate(comparison.axes):
        if len({setting[i] for setting in values}) == len(values):  # each value once, as in a random search: no mean
            continue
        levels: dict[str, list[float]] = {}
        for setting, group in values.items():
            levels.setdefault(setting[i], []).extend(group)
        between = sum(len(v) * (statistics.fmean(v) - statistics.fmean(pooled)) ** 2 for v in levels.values())
        means = ", ".join(f"{name} {statistics.fmean(v):.4f}" for name, v in levels.items())
        lines.append(f"{axis}: {means}; explains {between / total if total else 0:.0%} of the variance between runs")
    return "\n".join(lines)


def format_mean_sd(values: Sequence[float]) -> str:
    """``mean ± standard deviation`` (n - 1); the mean alone for one value.

    >>> format_mean_sd([1.0, 2.0, 3.0]), format_mean_sd([0.5])
    ('2.0000 ± 1.0000', '0.5000')
    """
    sd = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{sd}"


def draw_comparison(comparison: Comparison, metrics: Sequence[str]) -> "Figure":
    """A panel for each of the first four metrics: a point for each run, and the mean and sd of each setting."""
    from matplotlib.figure import Figure

    shown = [m for m in metrics[:4] if comparison.rank(m)]
    columns, rows = min(2, max(1, len(shown))), -(-len(shown) // 2) or 1
    figure = Figure(figsize=(6.5 * columns, rows * (1.2 + 0.4 * len(comparison.runs))), layout="constrained")
    for index, metric in enumerate(shown, 1):
        axes = figure.add_subplot(rows, columns, index)
        order = comparison.rank(metric)[::-1]
        for y, setting in enumerate(order):
            values = list(comparison.values(setting, metric).values())
            color = "#1b7f79" if setting == order[-1] else "#888888"
            axes.plot(values, [y] * len(values), "o", color=color, alpha=0.45, ms=5)
            sd = statistics.stdev(values) if len(values) > 1 else math.nan
            axes.errorbar(statistics.fmean(values), y - 0.18, xerr=sd, fmt="|", color=color, capsize=3, ms=9, lw=1.5)
        labels = [comparison.label(setting, "all", short=True) for setting in order]
        axes.set(yticks=range(len(order)), yticklabels=labels, xlabel=metric.removeprefix("test/"))
        axes.set_ylim(-0.6, len(order) - 0.5)
        axes.spines[["top", "right"]].set_visible(False)
    return figure
