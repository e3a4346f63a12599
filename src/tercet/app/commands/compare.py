"""Finished runs, as they lie on disk."""

import csv
import math
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from tercet.app import record, report
from tercet.errors import InputError
from tercet.messages import print_status
from tercet.paths import check_writable

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, its ``metrics``, and what its command ``set``."""

    folder: Path
    seed: int
    metrics: dict[str, float]
    set: dict[str, str]
    command: str
    optimized: str | None


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """All finished runs at or below ``paths``; runs that have written no metrics are counted."""
    for path in paths:
        if not path.is_dir():
            raise InputError(f"runs={path}: there is no such folder. Give run folders, or one that holds them.")
    folders = {file.parent for path in paths for file in path.rglob("config.yaml")}
    whole = [folder for folder in folders if not folders & set(folder.parents)]  # a run's stages are parts of it
    runs = [_run(folder) for folder in sorted(whole, key=_natural) if (folder / "metrics.json").is_file()]
    if unfinished := len(whole) - len(runs):
        print_status(f"{unfinished} runs have not finished and are left out.")
    if not runs:
        raise InputError(f"runs={', '.join(map(str, paths))}: no finished run (config.yaml and metrics.json) is there.")
    return runs


def _natural(folder: Path) -> list[Any]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in folder.parts]


def _run(folder: Path) -> Run:
    cfg = OmegaConf.load(folder / "config.yaml")
    assert isinstance(cfg, DictConfig)
    typed = list(cfg.get("command") or [])
    given, command = [part.partition("=") for part in typed], shlex.join(["python", "train.py", *typed])
    return Run(
        folder,
        int(cfg.seed),
        record.read_metrics(folder),
        {k: v for k, _, v in given},
        command,
        cfg.get("optimized_metric"),
    )


IGNORED_KEYS = (*record.KEYS_WITHOUT_EFFECT, "seed", "callback", "+", "~", "hydra")
SMALLER = ("alignment", "uniformity", "loss", "perplexity", "forgotten")  # of these metrics less is better
DRAWS = 10_000


Setting = tuple[str, ...]  # a value for each axis


@dataclass(frozen=True)
class Comparison:
    """Runs by setting; ``axes`` are what their commands set differently, the seed aside."""

    axes: tuple[str, ...]
    runs: dict[Setting, list[Run]]

    def values(self, setting: Setting, metric: str) -> dict[int, float]:
        """By seed."""
        return {run.seed: run.metrics[metric] for run in self.runs[setting] if metric in run.metrics}

    def order(self, metric: str) -> list[Setting]:
        """The settings that have the metric, the best first."""
        there = [s for s in self.runs if self.values(s, metric)]
        sign = 1 if less_is_better(metric) else -1
        return sorted(there, key=lambda s: sign * statistics.fmean(self.values(s, metric).values()))

    def metrics(self) -> list[str]:
        """What the runs' tests measured; the one that they were to optimize alone, if all say the same."""
        every = [run for runs in self.runs.values() for run in runs]
        wanted = {run.optimized for run in every}
        names = {name for run in every for name in run.metrics if name.startswith("test/")}
        tests = sorted(names, key=lambda name: (less_is_better(name), name))
        return [m for m in wanted if m] if len(wanted) == 1 and wanted <= set(tests) else tests


def less_is_better(metric: str) -> bool:
    """Whether a smaller value of the metric is the better one."""
    return metric.endswith(SMALLER)


def run(cfg: DictConfig, output: Path) -> None:
    """``python -m tercet compare <folders>``."""
    paths = [Path(p) for p in ([cfg.runs] if isinstance(cfg.runs, str) else cfg.runs)]
    found = read_runs(paths)
    target = Path(cfg.output) if cfg.output else paths[0]
    check_writable(target, "output")
    compared = group_runs(found)
    if cfg.metric and cfg.metric not in {name for one in found for name in one.metrics}:
        known = ", ".join(sorted({name for one in found for name in one.metrics if name.startswith("test/")}))
        raise InputError(f"metric={cfg.metric} is in none of the runs. There are: {known}.")
    write_comparison(compared, [cfg.metric] if cfg.metric else compared.metrics(), target)


def group_runs(runs: Sequence[Run]) -> Comparison:
    """By what their commands set differently; where a command says nothing of an axis it is its experiment's."""
    keys = dict.fromkeys(key for one in runs for key in one.set if not key.startswith(IGNORED_KEYS))
    axes = tuple(key for key in keys if len({one.set.get(key) for one in runs}) > 1)
    found: dict[Setting, list[Run]] = {}
    for one in runs:
        found.setdefault(tuple(one.set.get(axis, "-") for axis in axes), []).append(one)
    return Comparison(axes, found)


def write_comparison(compared: Comparison, metrics: Sequence[str], folder: Path) -> None:
    """``comparison.txt``, which is printed, ``.csv`` with every metric of every run, and ``.png``."""
    text = comparison_text(compared, metrics)
    print_status("\n" + text)
    (folder / "comparison.txt").write_text(text + "\n", encoding="utf-8")
    with (folder / "comparison.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        names = sorted({name for runs in compared.runs.values() for run in runs for name in run.metrics})
        table.writerow([*compared.axes, "seed", "folder", *names])
        for setting, runs in compared.runs.items():
            for one in runs:
                table.writerow([*setting, one.seed, one.folder, *(one.metrics.get(name, "") for name in names)])
    draw_comparison(compared, metrics).savefig(folder / "comparison.png", dpi=150)
    title, said = (
        f"{sum(map(len, compared.runs.values()))} runs compared",
        verdict(compared, metrics[0]) if metrics else "",
    )
    report.write_comparison_page(folder, title, said, text, folder / "comparison.png")
    print_status(f"Written to {folder}: report.html, comparison.txt, .csv, .png")


def comparison_text(compared: Comparison, metrics: Sequence[str]) -> str:
    """The tables, as text: settings, axes, and the best run of the first metric."""
    blocks = []
    for metric in metrics:
        blocks += [ranking(compared, metric), *(effects(compared, metric) if len(compared.axes) > 1 else [])]
    if metrics and (order := compared.order(metrics[0])):
        pick = min if less_is_better(metrics[0]) else max
        best = pick((one for one in compared.runs[order[0]] if metrics[0] in one.metrics), key=lambda r: r.metrics[metrics[0]])
        blocks.append(f"best run: {best.folder}, {metrics[0]} = {best.metrics[metrics[0]]:.4f}\n  {best.command}")
    return "\n\n".join(blocks)


def verdict(compared: Comparison, metric: str) -> str:
    """Which setting is ahead, and of which by how much: a sentence."""
    order = compared.order(metric)
    names = [" ".join(f"{axis}={value}" for axis, value in zip(compared.axes, s, strict=True)) or "all runs" for s in order]
    best = compared.values(order[0], metric)
    said = f"{names[0]}: {metric} {mean_and_sd(list(best.values()))}"
    if len(order) == 1:
        return f"{said}."
    differences = paired(best, compared.values(order[1], metric))
    if len(differences) < 2:
        return f"{said}, before {names[1]} (no two seeds in common)."
    mean, low, high, _ = paired_bootstrap(differences)
    sure = "ahead of" if low * high > 0 else "not surely ahead of"
    return f"{said}, {sure} {names[1]} by {mean:+.4f} [{low:+.4f}, {high:+.4f}]."


def ranking(compared: Comparison, metric: str) -> str:
    """A row each setting: mean ± sd over its seeds, and how the best stands against it on the seeds that both have."""
    order = compared.order(metric)
    head = (
        [*compared.axes, "runs", "mean ± sd", "the best is ahead by", "in so many draws"]
        if compared.axes
        else ["runs", "mean ± sd"]
    )
    rows = [head]
    for setting in order:
        values = compared.values(setting, metric)
        row = [*setting, str(len(values)), mean_and_sd(list(values.values()))]
        if compared.axes:
            row += ["", ""] if setting == order[0] else _against(compared.values(order[0], metric), values)
        rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(f"{c:{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([f"{metric}, {'less' if less_is_better(metric) else 'more'} is better", *lines])


def _against(best: dict[int, float], other: dict[int, float]) -> list[str]:
    differences = paired(best, other)
    if len(differences) < 2:
        return ["no two seeds in common", ""]
    mean, low, high, share = paired_bootstrap(differences)
    return [f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]", f"{max(share, 1 - share):.0%}"]


def paired(best: dict[int, float], other: dict[int, float]) -> list[float]:
    """By how much the best is ahead, for each seed that both have."""
    return [best[seed] - other[seed] for seed in sorted(best.keys() & other.keys())]


def paired_bootstrap(differences: Sequence[float]) -> tuple[float, float, float, float]:
    """The mean difference over seeds, its 95 % interval, and in what share of resamples it is above 0.

    Seeds are drawn again with replacement (Efron and Tibshirani 1993, chapter 13), all ``n^n`` draws where those are
    few. Of three seeds it says little: an interval that misses 0 means that all three agree.
    """
    d, n = np.asarray(differences), len(differences)
    if n**n <= DRAWS:
        picks = np.stack(np.meshgrid(*[np.arange(n)] * n), -1).reshape(-1, n)
    else:
        picks = np.random.default_rng(0).integers(0, n, (DRAWS, n))
    means = d[picks].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(d.mean()), float(low), float(high), float((means > 0).mean() + (means == 0).mean() / 2)


def effects(compared: Comparison, metric: str) -> list[str]:
    """For each axis the mean at each of its values, and which part of the variance between runs it explains (eta squared)."""
    every = {s: list(compared.values(s, metric).values()) for s in compared.order(metric)}
    grand = [x for values in every.values() for x in values]
    total = sum((x - statistics.fmean(grand)) ** 2 for x in grand)
    lines = []
    for i, axis in enumerate(compared.axes):
        if len({setting[i] for setting in every}) == len(every):  # drawn anew each time: there is no mean to speak of
            continue
        parts: dict[str, list[float]] = {}
        for setting, values in every.items():
            parts.setdefault(setting[i], []).extend(values)
        between = sum(len(v) * (statistics.fmean(v) - statistics.fmean(grand)) ** 2 for v in parts.values())
        means = ", ".join(f"{name} {statistics.fmean(v):.4f}" for name, v in parts.items())
        lines.append(f"{axis}: {means}; explains {between / total if total else 0:.0%} of the variance between runs")
    return ["\n".join(lines)] if lines else []


def mean_and_sd(values: Sequence[float]) -> str:
    """Mean ± standard deviation (n - 1); one value has none."""
    sd = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{sd}"


def draw_comparison(compared: Comparison, metrics: Sequence[str]) -> "Figure":
    """A panel for each of the first four metrics: every run a point, each setting's mean and sd beside them."""
    from matplotlib.figure import Figure

    shown = [m for m in metrics[:4] if compared.order(m)]
    wide, deep = min(2, max(1, len(shown))), -(-len(shown) // 2) or 1
    figure = Figure(figsize=(6.5 * wide, deep * (1.2 + 0.4 * len(compared.runs))), layout="constrained")
    for place, metric in enumerate(shown, 1):
        axis = figure.add_subplot(deep, wide, place)
        order = compared.order(metric)[::-1]
        for y, setting in enumerate(order):
            values = list(compared.values(setting, metric).values())
            color = "#1b7f79" if setting == order[-1] else "#888888"
            axis.plot(values, [y] * len(values), "o", color=color, alpha=0.45, ms=5)
            sd = statistics.stdev(values) if len(values) > 1 else math.nan
            axis.errorbar(statistics.fmean(values), y - 0.18, xerr=sd, fmt="|", color=color, capsize=3, ms=9, lw=1.5)
        labels = [" ".join(f"{a.split('.')[-1]}={v}" for a, v in zip(compared.axes, s, strict=True)) or "all" for s in order]
        axis.set(
            yticks=range(len(order)),
            yticklabels=labels,
            xlabel=metric.removeprefix("test/"),
            ylim=(-0.6, len(order) - 0.5),
        )
        axis.spines[["top", "right"]].set_visible(False)
    return figure
