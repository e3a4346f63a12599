"""The summary of a sweep: mean and standard deviation of its jobs' metrics, as a table and as ``summary.json``."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from tercet.app import record, run_files
from tercet.app.commands.compare import Comparison, group_runs, read_runs, write_comparison
from tercet.app.commands.stages import draw_stages
from tercet.messages import print_status, sample_sd
from tercet.paths import atomic_write, write_text

Summary = dict[str, dict[str, float]]  # metric -> mean, sd, runs


def summarize_sweep(root: Path, stages: DictConfig) -> bool:
    """Print and write the metrics of a sweep's jobs: ``summary.json`` and the comparison. False if a job has failed."""
    jobs = run_files.find_runs([folder for folder in root.iterdir() if folder.is_dir()], [run_files.SETTINGS, run_files.ERROR])
    if not jobs:
        return True
    done = [folder for folder in jobs if run_files.is_finished(folder)]
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
        error = folder / run_files.ERROR
        print_status(f"job {folder.relative_to(root)} {f'failed: {error}' if error.is_file() else 'has not finished'}")
    write_text(root / "summary.json", json.dumps(content, indent=2) + "\n")
    print_status(f"Written to {root / 'summary.json'}")
    return not any((folder / run_files.ERROR).is_file() for folder in failed)


def _show_summary(summary: Summary, runs: int, stages: DictConfig, root: Path) -> None:
    names = [name for name, stage in stages.runs.items() if stage is not None]
    print_status("\n" + summary_table(summary, runs, names[:-1]))  # the last stage's metrics are the test's
    if names:
        means, sds = (
            {stage: record.stage_metrics({n: x[key] for n, x in summary.items()}, stage) for stage in ("before", *names)}
            for key in ("mean", "sd")
        )
        with atomic_write(root / "stages.png") as partial:
            draw_stages(means, stages, sds).savefig(partial, dpi=150)


def summarize(runs: Sequence[dict[str, float]]) -> Summary:
    """Mean, standard deviation (n - 1) and number of runs of each metric; those of training and validation are left out.

    >>> summarize([{"test/mrr": 0.25, "train/loss": 1.0}, {"test/mrr": 0.25}])
    {'test/mrr': {'mean': 0.25, 'sd': 0.0, 'runs': 2}}
    """
    summary = {}
    for name in sorted({name for run in runs for name in run if not name.startswith(("train/", "val/"))}):
        values = [run[name] for run in runs if name in run]
        sd = sample_sd(values) if len(values) > 1 else 0.0
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
