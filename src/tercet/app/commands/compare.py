"""The command ``compare``: finished runs, or results of ``evaluate``, in one table, with the uncertainty of the differences.

Two uncertainties: another training run (the seeds), and other test examples with the same models. A setting of runs is called
ahead by the first one only, a model of which there are results by the second; both corrected for the number of pairs, as
which one is the best was seen in the same numbers.
"""

import csv
import math
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from omegaconf import DictConfig

from tercet.app import examples, record, report, run_files
from tercet.app.examples import compare_examples, examples_beside, open_examples, read_examples
from tercet.app.run_files import is_smaller_better
from tercet.errors import require
from tercet.evaluation.direction import SMALLER_IS_BETTER
from tercet.evaluation.figures import figure_text, make_axes
from tercet.evaluation.significance import PairedDifference, holm, paired_difference
from tercet.messages import csv_cell, format_mean_sd, print_status, printable, sample_sd
from tercet.paths import atomic_write, check_writable, write_text

IGNORED_KEYS = (*record.KEYS_WITHOUT_EFFECT, "seed", "hydra")
NO_SEEDS = "no two seeds in common"
LEAST_SEEDS = 3  # for a verdict
LEVEL = 0.05  # of all claims of a table together

LEGEND = """\
lead [95 %]: the difference on the seeds that both have, and Student's t interval: how far it moves with another training run.
p, sign test: of the t test and of the exact sign test over these seeds, corrected for all pairs of settings (Holm). A setting
is called behind where p is below 0.05. With one or two seeds there is no verdict; n seeds give no sign test below 2^(1-n).
examples: paired approximate randomization over the test's examples, corrected too (Holm): how it would be with other examples
and the same trained models. It says nothing about other seeds."""
RESULTS_LEGEND = """\
examples: p of paired approximate randomization over the test's examples, corrected for all pairs of results (Holm), each
metric by itself: how it would be with other examples and the same trained models. A model is called behind where it is below
0.05. There are no seeds here, so it says nothing about other training runs: compare folders of runs, of several seeds, for
that."""

Setting = tuple[str, ...]  # a value for each axis


@dataclass(frozen=True)
class Run:
    """A finished run; ``overrides`` are the keys and values of its command, ``optimized`` its optimized metric.

    ``smaller_is_better`` has the names of metrics, without their stage, suite and task. Results of ``evaluate`` are a run
    without a seed, whose ``folder`` is their file.
    """

    folder: Path
    seed: int | None
    metrics: dict[str, float]
    overrides: dict[str, str]
    command: str
    optimized: str | None
    smaller_is_better: frozenset[str] = SMALLER_IS_BETTER

    @property
    def examples(self) -> Path:
        """The file with its values by example."""
        return examples_beside(self.folder) if self.seed is None else self.folder / examples.EXAMPLES


class Lead(NamedTuple):
    """The difference between the means of two settings, over seeds (None: fewer than two in common), and its p values.

    ``p`` is of the t test and ``sign_p`` of the sign test, both over seeds; ``examples_p`` of randomization over examples; all
    are corrected.
    """

    difference: float
    seeds: PairedDifference | None
    p: float | None
    sign_p: float | None
    examples_p: float | None

    @property
    def is_sure(self) -> bool:
        """Whether the t interval over enough seeds, corrected for the number of pairs, excludes 0."""
        return self.seeds is not None and self.seeds.n >= LEAST_SEEDS and self.p is not None and self.p < LEVEL

    @property
    def is_sure_of_examples(self) -> bool:
        """Whether other examples would give the same order of the same trained models."""
        return self.examples_p is not None and self.examples_p < LEVEL

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

    @property
    def has_seeds(self) -> bool:
        """Whether these are training runs, not results of ``evaluate``."""
        return any(run.seed is not None for runs in self.runs.values() for run in runs)

    def rank(self, metric: str) -> dict[Setting, dict[int | None, float]]:
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
        files = tuple(tuple(run.examples for run in self.runs[setting]) for setting in ranked)
        is_test, name = metric.startswith("test/"), metric.removeprefix("test/")
        over_examples = compare_examples(files, name) if is_test else {}
        best, *others = ranked
        leads = {}
        for i, other in enumerate(others, start=1):
            pair = best, other
            first, second = (statistics.fmean(ranked[setting].values()) for setting in pair)
            over_seeds = pairs.get(pair), adjusted.get(pair), signs.get(pair)
            leads[other] = Lead(first - second, *over_seeds, over_examples.get((0, i)))
        return leads

    def label(self, setting: Setting, short: bool = False) -> str:
        """``key=value`` of each axis; a ``short`` label has the last word of each key."""
        pairs = zip(self.axes, setting, strict=True)
        return " ".join(f"{axis.split('.')[-1] if short else axis}={value}" for axis, value in pairs) or "all runs"


def run(cfg: DictConfig, output: Path) -> None:
    """Compare ``cfg.runs``, folders or files, and write the tables into ``cfg.output``, the folder of runs or one beside."""
    paths = [Path(p) for p in ([cfg.runs] if isinstance(cfg.runs, str) else cfg.runs)]
    files = [path for path in paths if path.suffix == ".json"]
    mixed = "runs has folders of runs and .json files of `tercet evaluate`: give either folders or files."
    require(len(files) in (0, len(paths)), mixed)
    comparison = group_results(read_evaluations(paths)) if files else group_runs(read_runs(paths))
    runs = [one for group in comparison.runs.values() for one in group]
    results = {one.folder: one.metrics for one in runs}
    names = examples.shared_metrics(results) if files else sorted({name for one in runs for name in one.metrics})
    alone = bool(files) or run_files.is_run(paths[0])  # not a folder of runs
    target = Path(cfg.output or (paths[0].parent / "comparison" if alone else paths[0]))
    in_use = f"output={target} is the folder of a run, whose report.html would be replaced. Name another."
    require(not run_files.is_run(target), in_use)
    check_writable(target, "output")
    known = ", ".join(name for name in names if name.startswith("test/"))
    fault = "has no values by example in all of these results" if files else "is in none of the runs"
    require(not cfg.metric or cfg.metric in names, f"metric={cfg.metric} {fault}. There are: {known}.")
    chosen = [cfg.metric] if cfg.metric else [name for name in comparison.metrics() if name in names]
    for name in chosen if files else ():
        examples.check_examples(results, name)
    write_comparison(comparison, chosen, target)


def read_evaluations(paths: Sequence[Path]) -> list[Run]:
    """The results that ``tercet evaluate`` has written to ``paths``, each with its values by example beside it."""
    require(len(set(paths)) == len(paths) > 1, f"runs={', '.join(map(str, paths))}: two or more different files are needed.")
    runs = []
    for path in paths:
        require(path.is_file(), f"runs={path}: there is no such file. `tercet evaluate` writes it, with output={path}.")
        metrics = {printable(name, lines=False): x for name, x in run_files.read_metrics(path.parent, path.name).items()}
        beside = examples_beside(path)
        missing = f"runs={path}: {beside.name}, its values by example, is not beside it"
        advice = "Run `tercet evaluate` anew, with an `evaluation` that gives such values: clustering, as one, gives none"
        require(beside.is_file(), f"{missing}. {advice}.")
        with open_examples(beside) as content:
            smaller = map(str, content[examples.SMALLER]) if examples.SMALLER in content else ()
            runs.append(Run(path, None, metrics, {}, "", None, SMALLER_IS_BETTER.union(smaller)))
    return runs


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
    command = printable(shlex.join(["tercet", "train", *given]), lines=False)
    metrics = {printable(name, lines=False): value for name, value in run_files.read_metrics(folder).items()}
    return Run(folder, seed, metrics, overrides, command, optimized, run_files.smaller_is_better(cfg))


def group_runs(runs: Sequence[Run]) -> Comparison:
    """Group runs by the overrides that differ between them; ``-`` stands for a key that a command does not set."""
    keys = dict.fromkeys(key for one in runs for key in one.overrides if not key.startswith(IGNORED_KEYS))
    axes = tuple(key for key in keys if len({one.overrides.get(key) for one in runs}) > 1)
    groups: dict[Setting, list[Run]] = {}
    for one in runs:
        groups.setdefault(tuple(one.overrides.get(axis, "-") for axis in axes), []).append(one)
    compared = {setting: _latest_of_each_seed(same) for setting, same in groups.items()}
    if repeated := len(runs) - sum(map(len, compared.values())):
        print_status(f"{repeated} runs repeat the setting and the seed of others; the latest of each is compared.")
    return Comparison(axes, compared)


def _latest_of_each_seed(runs: Sequence[Run]) -> list[Run]:
    def finished(one: Run) -> int:
        return (one.folder / run_files.RESULTS).stat().st_mtime_ns

    groups = [[one for one in runs if one.seed == seed] for seed in dict.fromkeys(one.seed for one in runs)]
    return [max(same, key=finished) if len(same) > 1 else same[0] for same in groups]


def group_results(runs: Sequence[Run]) -> Comparison:
    """Results of ``evaluate`` by their files."""
    return Comparison(("results",), {(printable(str(one.folder), lines=False),): [one] for one in runs})


def write_comparison(comparison: Comparison, metrics: Sequence[str], folder: Path) -> None:
    """Write ``comparison.txt`` (printed too), ``.csv`` (all metrics of all runs), ``.png`` and ``report.html``."""
    text = comparison_text(comparison, metrics)
    print_status("\n" + text)
    write_text(folder / "comparison.txt", text + "\n")
    with atomic_write(folder / "comparison.csv") as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        names = sorted({name for runs in comparison.runs.values() for run in runs for name in run.metrics})
        own = ["seed", "folder"] if comparison.has_seeds else []
        writer.writerow(map(csv_cell, [*comparison.axes, *own, *names]))
        for setting, runs in comparison.runs.items():
            for one in runs:
                cells = [*setting, *[one.seed, str(one.folder)][: len(own)], *(one.metrics.get(n, "") for n in names)]
                writer.writerow(map(csv_cell, cells))
    with atomic_write(folder / "comparison.png") as partial:
        draw_comparison(comparison, metrics).savefig(partial, dpi=150)
    title = f"{sum(map(len, comparison.runs.values()))} {'runs' if comparison.has_seeds else 'results'} compared"
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
    if metrics and not comparison.has_seeds:
        blocks += [RESULTS_LEGEND, describe_best(comparison, metrics[0])]
    elif metrics:
        metric, pick = metrics[0], min if comparison.is_smaller_better(metrics[0]) else max
        setting = next(iter(comparison.rank(metric)))
        runs = [one for one in comparison.runs[setting] if metric in one.metrics]
        best = pick(runs, key=lambda one: one.metrics[metric])
        if comparison.axes:
            blocks.append(LEGEND)
        if not metric.startswith("test/"):  # it has chosen the setting, whose tests are fair
            names = sorted(name for name in best.metrics if name.startswith("test/"))
            lines = [f"  {n}  {format_mean_sd([one.metrics[n] for one in runs if n in one.metrics])}" for n in names]
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
    if not comparison.has_seeds:
        ahead = "ahead of" if lead.is_sure_of_examples else "not surely ahead of"
        count = len(read_examples(comparison.runs[first][0].examples, metric.removeprefix("test/"))[0])
        found = f"{lead.difference:+.4f} over {count} test examples, p {format_p(lead.examples_p)}"
        pairs = f" corrected for {math.comb(len(ranked), 2)} pairs of results" if len(ranked) > 2 else ""
        return f"{sentence}, {ahead} {second} by {found}{pairs}. That is about other test examples, not other training runs."
    if lead.seeds is None or lead.seeds.n < LEAST_SEEDS:
        few = f" over {lead.seeds.n} seeds" if lead.seeds else ""
        return f"{sentence}, before {second} ({lead}{few}: this is no verdict)."
    pairs = f"{math.comb(len(ranked), 2)} pairs of settings"
    found = f"{lead} over {lead.seeds.n} seeds, p {format_p(lead.p)} corrected for {pairs}"
    return f"{sentence}, {'ahead of' if lead.is_sure else 'not surely ahead of'} {second} by {found}."


def ranking_table(comparison: Comparison, metric: str) -> str:
    """A row for each setting: mean ± sd over its seeds, and the lead of the best setting with its p values."""
    ranked, leads = comparison.rank(metric), comparison.leads(metric)
    seeds = comparison.has_seeds
    head = ["mean ± sd", "lead of the best [95 %]"] if seeds else ["value", "lead of the best"]
    rows = [[*comparison.axes, "runs", *head, "p", "sign test", "examples", ""]]
    for setting, values in ranked.items():
        rest = [""] * 5
        if lead := leads.get(setting):
            behind = lead.is_sure if seeds else lead.is_sure_of_examples
            p_values = map(format_p, (lead.p, lead.sign_p, lead.examples_p))
            rest = [str(lead) if seeds else f"{lead.difference:+.4f}", *p_values, "behind" if behind else ""]
        rows.append([*setting, str(len(values)) if seeds else "", format_mean_sd(values.values()), *rest])
    width = len(comparison.axes) + 2 if len(ranked) == 1 else None  # one setting leads nobody
    columns = [[row[i] for row in rows] for i in range(width or len(rows[0]))]
    columns = [column for column in columns if any(column[1:])]
    table = [[f"{cell:{max(map(len, column))}}" for cell in column] for column in columns]
    lines = ["  ".join(row).rstrip() for row in zip(*table, strict=True)]
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
    figure, panels = make_axes(6.5 * columns, rows * (1.2 + 0.4 * len(comparison.runs)), rows, columns, len(shown))
    for axes, metric in zip(panels, shown, strict=True):
        ranked = list(comparison.rank(metric).items())[::-1]
        for y, (_, by_seed) in enumerate(ranked):
            values, color = list(by_seed.values()), "#1b7f79" if y == len(ranked) - 1 else "#888888"
            axes.plot(values, [y] * len(values), "o", color=color, alpha=0.45, ms=5)
            mean, sd = statistics.fmean(values), sample_sd(values)
            axes.errorbar(mean, y - 0.18, xerr=sd, fmt="|", color=color, capsize=3, ms=9, lw=1.5)
        axes.set(yticks=range(len(ranked)), ylim=(-0.6, len(ranked) - 0.5), xlabel=figure_text(metric.removeprefix("test/")))
        axes.set_yticklabels([figure_text(comparison.label(setting, short=True)) for setting, _ in ranked])
    return figure
