"""The command ``compare``: finished runs in one table, with the uncertainty of the differences between settings."""

import csv
import json
import math
import shlex
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf

from tercet.app import record, report
from tercet.app.commands.stages import draw_stages
from tercet.errors import require
from tercet.messages import print_status
from tercet.paths import check_writable

IGNORED_KEYS = (*record.KEYS_WITHOUT_EFFECT, "seed", "hydra")
LESS_IS_BETTER = ("alignment", "uniformity", "loss", "perplexity", "forgotten")  # metrics, by how their names end
MAX_RESAMPLES = 10_000

Setting = tuple[str, ...]  # a value for each axis
Summary = dict[str, dict[str, float]]  # metric -> mean, sd, runs


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

    def rank(self, metric: str) -> dict[Setting, dict[int, float]]:
        """The values of a metric by seed, for each setting that has it, from the best mean to the worst."""
        found = {s: {run.seed: run.metrics[metric] for run in runs if metric in run.metrics} for s, runs in self.runs.items()}
        sign = 1 if metric.endswith(LESS_IS_BETTER) else -1
        measured = [(setting, values) for setting, values in found.items() if values]
        return dict(sorted(measured, key=lambda pair: sign * statistics.fmean(pair[1].values())))

    def metrics(self) -> list[str]:
        """The metrics of the test stage; only the optimized metric where all runs have the same one."""
        runs = [run for group in self.runs.values() for run in group]
        names = {name for run in runs for name in run.metrics if name.startswith("test/")}
        tests, first = sorted(names, key=lambda name: (name.endswith(LESS_IS_BETTER), name)), runs[0].optimized
        return [first] if first in tests and all(run.optimized == first for run in runs) else tests

    def label(self, setting: Setting, short: bool = False) -> str:
        """``key=value`` of each axis; a ``short`` label has the last word of each key."""
        pairs = zip(self.axes, setting, strict=True)
        return " ".join(f"{axis.split('.')[-1] if short else axis}={value}" for axis, value in pairs) or "all runs"


def run(cfg: DictConfig, output: Path) -> None:
    """Compare the runs in the folders ``cfg.runs`` and write the files into ``cfg.output``, or the first of these folders."""
    paths = [Path(p) for p in ([cfg.runs] if isinstance(cfg.runs, str) else cfg.runs)]
    runs = read_runs(paths)
    target = Path(cfg.output or paths[0])
    check_writable(target, "output")
    comparison = group_runs(runs)
    names = sorted({name for one in runs for name in one.metrics})
    known = ", ".join(name for name in names if name.startswith("test/"))
    require(not cfg.metric or cfg.metric in names, f"metric={cfg.metric} is in none of the runs. There are: {known}.")
    write_comparison(comparison, [cfg.metric] if cfg.metric else comparison.metrics(), target)


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """All finished runs in or below ``paths``; prints how many have no metrics and are left out."""
    for path in paths:
        require(path.is_dir(), f"runs={path}: there is no such folder. Give run folders, or one that holds them.")
    folders = {file.parent for path in paths for file in path.rglob("config.yaml")}
    top = [folder for folder in folders if not folders & set(folder.parents)]  # the stages of a run are not runs
    top.sort(key=lambda folder: [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in folder.parts])
    runs = [_read_run(folder) for folder in top if (folder / "metrics.json").is_file()]
    if unfinished := len(top) - len(runs):
        print_status(f"{unfinished} runs have not finished and are left out.")
    require(runs, f"runs={', '.join(map(str, paths))}: no finished run (config.yaml and metrics.json) is there.")
    return runs


def _read_run(folder: Path) -> Run:
    cfg: Any = OmegaConf.load(folder / "config.yaml")
    given = list(cfg.get("command") or [])
    overrides = dict(part.partition("=")[::2] for part in given)
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
            writer.writerows([*setting, one.seed, one.folder, *(one.metrics.get(n, "") for n in names)] for one in runs)
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
    if metrics:
        metric, pick = metrics[0], min if metrics[0].endswith(LESS_IS_BETTER) else max
        runs = comparison.runs[next(iter(comparison.rank(metric)))]
        best = pick((one for one in runs if metric in one.metrics), key=lambda one: one.metrics[metric])
        blocks.append(f"best run: {best.folder}, {metric} = {best.metrics[metric]:.4f}\n  {best.command}")
    return "\n\n".join(blocks)


def describe_best(comparison: Comparison, metric: str) -> str:
    """A sentence: the best setting, and by how much it is ahead of the second."""
    (first, best), *others = comparison.rank(metric).items()
    sentence = f"{comparison.label(first)}: {metric} {format_mean_sd(best.values())}"
    if not others:
        return f"{sentence}."
    second, (lead, _, sure) = comparison.label(others[0][0]), paired_lead(best, others[0][1])
    if sure is None:
        return f"{sentence}, before {second} ({lead})."
    return f"{sentence}, {'ahead of' if sure else 'not surely ahead of'} {second} by {lead}."


def ranking_table(comparison: Comparison, metric: str) -> str:
    """A row for each setting: mean ± sd over its seeds, and the lead of the best setting on the seeds that both have."""
    ranked = comparison.rank(metric)
    best = next(iter(ranked.values()))
    rows = [[*comparison.axes, "runs", "mean ± sd", "lead of the best [95 %]", "resamples that agree"]]
    for setting, values in ranked.items():
        lead = ("", "") if values is best else paired_lead(best, values)[:2]
        rows.append([*setting, str(len(values)), format_mean_sd(values.values()), *lead])
    if not comparison.axes:  # one setting
        rows = [row[:2] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([f"{metric}, {'less' if metric.endswith(LESS_IS_BETTER) else 'more'} is better", *lines])


def paired_lead(best: dict[int, float], other: dict[int, float]) -> tuple[str, str, bool | None]:
    """``best - other`` on the seeds of both: ``mean [95 %]``, the resamples that agree, and if the interval excludes 0."""
    differences = [best[seed] - other[seed] for seed in sorted(best.keys() & other.keys())]
    if len(differences) < 2:
        return "no two seeds in common", "", None
    mean, low, high, share = paired_bootstrap(differences)
    return f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]", f"{max(share, 1 - share):.0%}", low * high > 0


def paired_bootstrap(differences: Sequence[float]) -> tuple[float, float, float, float]:
    """The mean difference over seeds, its 95 % interval, and the share of resamples with a mean above 0.

    Seeds are resampled with replacement (Efron and Tibshirani 1993, chapter 13): all ``n^n`` resamples if these are at
    most ``MAX_RESAMPLES``, else that many at random. With three seeds an interval without 0 means only that all three agree.

    >>> [round(x, 3) for x in paired_bootstrap([0.1, 0.2, 0.3])]
    [0.2, 0.122, 0.278, 1.0]
    """
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
    ranked = comparison.rank(metric)
    pooled = [x for values in ranked.values() for x in values.values()]
    mean, lines = statistics.fmean(pooled), []
    total = sum((x - mean) ** 2 for x in pooled)
    for i, axis in enumerate(comparison.axes):
        levels: dict[str, list[float]] = {}
        for setting, values in ranked.items():
            levels.setdefault(setting[i], []).extend(values.values())
        if len(levels) < len(ranked):  # else each value stands once, as in a random search: no mean
            between = sum(len(v) * (statistics.fmean(v) - mean) ** 2 for v in levels.values())
            means = ", ".join(f"{name} {statistics.fmean(v):.4f}" for name, v in levels.items())
            lines.append(f"{axis}: {means}; explains {between / total if total else 0:.0%} of the variance between runs")
    return "\n".join(lines)


def format_mean_sd(values: Collection[float]) -> str:
    """``mean ± standard deviation`` (n - 1); the mean alone for one value.

    >>> format_mean_sd([1.0, 2.0, 3.0]), format_mean_sd([0.5])
    ('2.0000 ± 1.0000', '0.5000')
    """
    sd = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{sd}"


def draw_comparison(comparison: Comparison, metrics: Sequence[str]) -> Figure:
    """A panel for each of the first four metrics: a point for each run, and the mean and sd of each setting."""
    shown = metrics[:4]
    columns, rows = min(2, max(1, len(shown))), -(-len(shown) // 2) or 1
    figure = Figure(figsize=(6.5 * columns, rows * (1.2 + 0.4 * len(comparison.runs))), layout="constrained")
    for index, metric in enumerate(shown, 1):
        axes = figure.add_subplot(rows, columns, index)
        ranked = list(comparison.rank(metric).items())[::-1]
        for y, (_, by_seed) in enumerate(ranked):
            values, color = list(by_seed.values()), "#1b7f79" if y == len(ranked) - 1 else "#888888"
            axes.plot(values, [y] * len(values), "o", color=color, alpha=0.45, ms=5)
            sd = statistics.stdev(values) if len(values) > 1 else math.nan
            axes.errorbar(statistics.fmean(values), y - 0.18, xerr=sd, fmt="|", color=color, capsize=3, ms=9, lw=1.5)
        axes.set(yticks=range(len(ranked)), ylim=(-0.6, len(ranked) - 0.5), xlabel=metric.removeprefix("test/"))
        axes.set_yticklabels([comparison.label(setting, short=True) for setting, _ in ranked])
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def summarize_sweep(root: Path, stages: DictConfig) -> bool:
    """Print and write the metrics of a sweep's jobs: ``summary.json`` and the comparison. False if a job has failed."""
    jobs = sorted((folder for folder in root.glob("*") if folder.name.isdigit()), key=lambda folder: int(folder.name))
    if not jobs:
        return True
    done = [folder for folder in jobs if (folder / "metrics.json").is_file()]
    comparison = group_runs(read_runs(done)) if done else Comparison((), {})
    summaries = {comparison.label(s): summarize([one.metrics for one in runs]) for s, runs in comparison.runs.items()}
    content: Any = summaries
    if len(summaries) > 1:
        write_comparison(comparison, comparison.metrics(), root)
    elif summaries:
        (content,) = summaries.values()
        _show_summary(content, len(done), stages, root)
    failed = [folder for folder in jobs if folder not in done]
    for folder in failed:
        print_status(f"job {folder.name} failed: {folder / 'error.txt'}")
    (root / "summary.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print_status(f"Written to {root / 'summary.json'}")
    return not any((folder / "error.txt").is_file() for folder in failed)


def _show_summary(summary: Summary, runs: int, stages: DictConfig, root: Path) -> None:
    names = [name for name, stage in stages.runs.items() if stage is not None]
    print_status("\n" + summary_table(summary, runs, names[:-1]))  # the last stage's metrics are the test's
    if names:
        means, sds = (
            {stage: record.stage_metrics({n: x[key] for n, x in summary.items()}, stage) for stage in ("before", *names)}
            for key in ("mean", "sd")
        )
        draw_stages(means, stages, sds).savefig(root / "stages.png", dpi=150)


def summarize(runs: Sequence[dict[str, float]]) -> Summary:
    """Mean, standard deviation (n - 1) and number of runs of each metric; those of training and validation are left out.

    >>> summarize([{"test/mrr": 0.25, "train/loss": 1.0}, {"test/mrr": 0.25}])
    {'test/mrr': {'mean': 0.25, 'sd': 0.0, 'runs': 2}}
    """
    summary = {}
    for name in sorted({name for run in runs for name in run if not name.startswith(("train/", "val/"))}):
        values = [run[name] for run in runs if name in run]
        sd = statistics.stdev(values) if len(values) > 1 else 0.0
        summary[name] = {"mean": statistics.fmean(values), "sd": sd, "runs": len(values)}
    return summary


def summary_table(summary: Summary, runs: int, stages: Sequence[str] = ()) -> str:
    """The test metrics before training, after each of ``stages``, and at the end, as text."""
    tests = [name.removeprefix("test/") for name in summary if name.startswith("test/")]
    width = max(map(len, tests), default=0)
    columns = ("before", *stages)
    lines = [f"mean ± sd over {runs} runs", f"{'':{width}}  {''.join(f'{name:>17}  →   ' for name in columns)}{'after':>17}"]
    for name in tests:
        entries = [summary.get(f"{column}/{name}") for column in (*columns, "test")]
        cells = [f"{entry['mean']:.4f} ± {entry['sd']:.4f}" if entry else "" for entry in entries]
        lines.append(f"{name:{width}}  " + "  →   ".join(f"{cell:>17}" for cell in cells))
    return "\n".join(lines)
