"""The command ``compare``: finished runs in one table, with the uncertainty of the differences between settings.

Two uncertainties: another training run (the seeds), and other test examples with the same models. A setting is called ahead
by the first one only, corrected for the number of pairs of settings: which one is the best was seen in the same runs.
"""

import csv
import functools
import math
import shlex
import statistics
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
from matplotlib.figure import Figure
from omegaconf import DictConfig

from tercet.app import record, report, run_files
from tercet.errors import require
from tercet.evaluation.direction import SMALLER_IS_BETTER, is_smaller_better
from tercet.evaluation.figures import figure_text
from tercet.evaluation.significance import PairedDifference, holm, paired_difference, randomization_tests
from tercet.messages import csv_cell, format_mean_sd, print_status, printable, sample_sd, warn_once
from tercet.paths import atomic_write, check_writable, write_text

IGNORED_KEYS = (*record.KEYS_WITHOUT_EFFECT, "seed", "hydra")
NO_SEEDS = "no two seeds in common"
EXAMPLES_SIZE = 1 << 28  # bytes of a run's values by example, unpacked
LEVEL = 0.05  # of all claims of a table together

LEGEND = """\
lead [95 %]: the difference on the seeds that both have, and Student's t interval: how far it moves with another training run.
p, sign test: of the t test and of the exact sign test over these seeds, corrected for all pairs of settings (Holm). A setting
is called behind where p is below 0.05. With one seed there is no verdict, and n seeds give no sign test below 2^(1-n).
examples: paired approximate randomization over the test's examples, corrected too (Holm): how it would be with other examples
and the same trained models. It says nothing about other seeds."""

Setting = tuple[str, ...]  # a value for each axis


@dataclass(frozen=True)
class Run:
    """A finished run; ``overrides`` are the keys and values of its command, ``optimized`` its optimized metric.

    ``smaller_is_better`` has the names of metrics, without their stage, suite and task.
    """

    folder: Path
    seed: int
    metrics: dict[str, float]
    overrides: dict[str, str]
    command: str
    optimized: str | None
    smaller_is_better: frozenset[str] = SMALLER_IS_BETTER


class Lead(NamedTuple):
    """The difference between two settings over seeds (None: fewer than two in common), and its corrected p values.

    ``p`` is of the t test and ``sign_p`` of the sign test, both over seeds; ``examples_p`` of randomization over examples.
    """

    seeds: PairedDifference | None
    p: float | None
    sign_p: float | None
    examples_p: float | None

    @property
    def is_sure(self) -> bool:
        """Whether the t interval over seeds, corrected for the number of pairs, excludes 0."""
        return self.p is not None and self.p < LEVEL

    def __str__(self) -> str:
        return f"{self.seeds.mean:+.4f} [{self.seeds.low:+.4f}, {self.seeds.high:+.4f}]" if self.seeds else NO_SEEDS


@dataclass(frozen=True)
class Comparison:
    """Runs by setting; ``axes`` are the keys whose values differ between the runs' commands, except the seed."""

    axes: tuple[str, ...]
    runs: dict[Setting, list[Run]]

    def is_smaller_better(self, metric: str) -> bool:
        """Whether less of a metric is better, as the runs have recorded."""
        return any(is_smaller_better(metric, run.smaller_is_better) for runs in self.runs.values() for run in runs)

    def rank(self, metric: str) -> dict[Setting, dict[int, float]]:
        """The values of a metric by seed, for each setting that has it, from the best mean to the worst."""
        found = {s: {run.seed: run.metrics[metric] for run in runs if metric in run.metrics} for s, runs in self.runs.items()}
        sign = 1 if self.is_smaller_better(metric) else -1
        measured = [(setting, values) for setting, values in found.items() if values]
        return dict(sorted(measured, key=lambda pair: sign * statistics.fmean(pair[1].values())))

    def metrics(self) -> list[str]:
        """The optimized metric where all runs have the same one, else the metrics of the test stage."""
        runs = [run for group in self.runs.values() for run in group]
        names = {name for run in runs for name in run.metrics}
        tests = sorted((n for n in names if n.startswith("test/")), key=lambda name: (self.is_smaller_better(name), name))
        first = runs[0].optimized
        return [first] if first in names and all(run.optimized == first for run in runs) else tests

    def leads(self, metric: str) -> dict[Setting, "Lead"]:
        """What the best setting is ahead by, for each other one, with p values that are corrected for all pairs of settings."""
        ranked = self.rank(metric)
        pairs = {pair: found for pair in combinations(ranked, 2) if (found := _on_common_seeds(*map(ranked.get, pair)))}
        adjusted = dict(zip(pairs, holm([found.p for found in pairs.values()]), strict=True))
        signs = dict(zip(pairs, holm([found.sign_p for found in pairs.values()]), strict=True))
        folders = tuple(tuple(run.folder for run in self.runs[setting]) for setting in ranked)
        examples = compare_examples(folders, metric.removeprefix("test/")) if metric.startswith("test/") else {}
        best, *others = ranked
        leads = {}
        for i, other in enumerate(others, start=1):
            pair = best, other
            leads[other] = Lead(pairs.get(pair), adjusted.get(pair), signs.get(pair), examples.get((0, i)))
        return leads

    def label(self, setting: Setting, short: bool = False) -> str:
        """``key=value`` of each axis; a ``short`` label has the last word of each key."""
        pairs = zip(self.axes, setting, strict=True)
        return " ".join(f"{axis.split('.')[-1] if short else axis}={value}" for axis, value in pairs) or "all runs"


@functools.cache
def compare_examples(settings: tuple[tuple[Path, ...], ...], metric: str) -> dict[tuple[int, int], float]:
    """The p values of randomization over the test's examples for each two settings, by index, corrected for all (Holm).

    A setting is the folders of its runs, over which values are averaged. Left out are pairs where a run has no values by
    example, or those of other examples.
    """
    values = [[_read_examples(folder / record.EXAMPLES, metric) for folder in folders] for folders in settings]
    means = [np.mean(runs, axis=0) if len({len(run) for run in runs}) == 1 else np.zeros(0) for runs in values]
    pairs = [(i, j) for i, j in combinations(range(len(means)), 2) if 0 < len(means[i]) == len(means[j])]
    found: dict[tuple[int, int], float] = {}
    for size in {len(means[i]) for i, _ in pairs}:
        same = [(i, j) for i, j in pairs if len(means[i]) == size]
        tests = randomization_tests(np.stack([means[i] - means[j] for i, j in same]))
        found |= dict(zip(same, tests, strict=True))
    return dict(zip(found, holm([*found.values()]), strict=True))


def _read_examples(path: Path, metric: str) -> Any:
    """The values of a metric by example ``(N,)``; none where there is no such file or metric, or it cannot be read."""
    if not path.is_file():
        return np.zeros(0)
    try:
        with np.load(path) as values:  # which refuses pickles
            size = sum(info.file_size for info in values.zip.infolist())
            require(size <= EXAMPLES_SIZE, f"{size:,} bytes, unpacked; {EXAMPLES_SIZE:,} are accepted")
            return values[metric].astype(np.float64).reshape(-1) if metric in values else np.zeros(0)
    except (OSError, ValueError, EOFError, AttributeError, MemoryError, BadZipFile, zlib.error) as error:
        warn_once(f"{path} cannot be read and is left out ({error}).")
        return np.zeros(0)


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
    found = run_files.find_runs(paths)
    runs = [_read_run(folder) for folder in found if run_files.is_finished(folder)]
    if unfinished := len(found) - len(runs):
        print_status(f"{unfinished} runs have not finished and are left out.")
    require(runs, f"runs={', '.join(map(str, paths))}: no finished run (config.yaml and metrics.json) is there.")
    return runs


def _read_run(folder: Path) -> Run:
    cfg = run_files.read_settings(folder)
    given, optimized = cfg.get("command") or [], cfg.get("optimized_metric")
    seed: Any = cfg.get("seed")
    typed = isinstance(given, list) and all(isinstance(part, str) for part in given)
    whole = typed and type(seed) is int and isinstance(optimized, str | None)
    require(whole, f"{folder / 'config.yaml'}: command (a list of texts), seed (a whole number) or optimized_metric is amiss.")
    overrides = dict(printable(part, lines=False).partition("=")[::2] for part in given)
    command = shlex.join(["python", "train.py", *given])
    metrics = {printable(name, lines=False): value for name, value in run_files.read_metrics(folder).items()}
    smaller = run_files.smaller_is_better(cfg)
    return Run(folder, seed, metrics, overrides, printable(command, lines=False), optimized, smaller)


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
    write_text(folder / "comparison.txt", text + "\n")
    with atomic_write(folder / "comparison.csv") as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        names = sorted({name for runs in comparison.runs.values() for run in runs for name in run.metrics})
        writer.writerow(map(csv_cell, [*comparison.axes, "seed", "folder", *names]))
        for setting, runs in comparison.runs.items():
            rows = ([*setting, one.seed, str(one.folder), *(one.metrics.get(n, "") for n in names)] for one in runs)
            writer.writerows(map(csv_cell, row) for row in rows)
    with atomic_write(folder / "comparison.png") as partial:
        draw_comparison(comparison, metrics).savefig(partial, dpi=150)
    title = f"{sum(map(len, comparison.runs.values()))} runs compared"
    headline = describe_best(comparison, metrics[0]) if metrics else ""
    report.write_comparison_page(folder, title, headline, text, folder / "comparison.png")
    print_status(f"Written to {folder}: report.html, comparison.txt, .csv, .png")


def comparison_text(comparison: Comparison, metrics: Sequence[str]) -> str:
    """The tables of all metrics as text, how to read them, and the command of the best run by the first metric."""
    blocks = []
    for metric in metrics:
        blocks.append(ranking_table(comparison, metric))
        if len(comparison.axes) > 1 and (effects := axis_effects(comparison, metric)):
            blocks.append(effects)
    if metrics:
        metric, pick = metrics[0], min if comparison.is_smaller_better(metrics[0]) else max
        setting = next(iter(comparison.rank(metric)))
        runs = [one for one in comparison.runs[setting] if metric in one.metrics]
        best = pick(runs, key=lambda one: one.metrics[metric])
        if comparison.axes:
            blocks.append(LEGEND)
        if not metric.startswith("test/"):  # it has chosen the setting, whose tests are fair
            tests = {
                n: [one.metrics[n] for one in runs if n in one.metrics] for n in sorted(best.metrics) if n.startswith("test/")
            }
            lines = [f"  {name}  {format_mean_sd(values)}" for name, values in tests.items()]
            blocks.append("\n".join([f"tests of {comparison.label(setting)}, which {metric} has chosen:", *lines]))
        blocks.append(f"best run: {best.folder}, {metric} = {best.metrics[metric]:.4f}\n  {best.command}")
    return printable("\n\n".join(blocks))


def describe_best(comparison: Comparison, metric: str) -> str:
    """A sentence: the best setting, and whether it is ahead of the second."""
    ranked = comparison.rank(metric)
    (first, best), *others = ranked.items()
    sentence = f"{comparison.label(first)}: {metric} {format_mean_sd(best.values())}"
    if not others:
        return f"{sentence}."
    second, lead = comparison.label(others[0][0]), comparison.leads(metric)[others[0][0]]
    if lead.seeds is None:
        return f"{sentence}, before {second} ({lead}: this is no verdict)."
    found = (
        f"{lead} over {lead.seeds.n} seeds, p {format_p(lead.p)} corrected for {math.comb(len(ranked), 2)} pairs of settings"
    )
    return f"{sentence}, {'ahead of' if lead.is_sure else 'not surely ahead of'} {second} by {found}."


def ranking_table(comparison: Comparison, metric: str) -> str:
    """A row for each setting: mean ± sd over its seeds, and the lead of the best setting with its p values."""
    ranked, leads = comparison.rank(metric), comparison.leads(metric)
    rows = [[*comparison.axes, "runs", "mean ± sd", "lead of the best [95 %]", "p", "sign test", "examples", ""]]
    for setting, values in ranked.items():
        lead = leads.get(setting)
        rest = [str(lead), *map(format_p, lead[1:]), "behind" if lead.is_sure else ""] if lead else []
        rows.append([*setting, str(len(values)), format_mean_sd(values.values()), *(rest or [""] * 5)])
    width = len(comparison.axes) + 2 if len(ranked) == 1 else None  # one setting leads nobody
    columns = [[row[i] for row in rows] for i in range(width or len(rows[0]))]
    columns = [column for column in columns if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    lines = [
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in zip(*columns, strict=True)
    ]
    return "\n".join([f"{metric}, {'less' if comparison.is_smaller_better(metric) else 'more'} is better", *lines])


def _on_common_seeds(best: Any, other: Any) -> PairedDifference | None:
    seeds = sorted(best.keys() & other.keys())
    return paired_difference([best[seed] - other[seed] for seed in seeds]) if len(seeds) > 1 else None


def format_p(p: float | None) -> str:
    """A p value with two significant digits; nothing for None.

    >>> format_p(0.0312), format_p(0.00004), format_p(1.0), format_p(None)
    ('0.031', '<0.0001', '1', '')
    """
    return "" if p is None else "<0.0001" if p < 1e-4 else f"{p:.2g}"


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
            mean, sd = statistics.fmean(values), sample_sd(values)
            axes.errorbar(mean, y - 0.18, xerr=sd, fmt="|", color=color, capsize=3, ms=9, lw=1.5)
        axes.set(yticks=range(len(ranked)), ylim=(-0.6, len(ranked) - 0.5), xlabel=figure_text(metric.removeprefix("test/")))
        axes.set_yticklabels([figure_text(comparison.label(setting, short=True)) for setting, _ in ranked])
        axes.spines[["top", "right"]].set_visible(False)
    return figure
