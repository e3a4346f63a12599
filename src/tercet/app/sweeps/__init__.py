"""Sweeps: the search with Optuna, jobs on Ray, and callbacks of Hydra: a summary over seeds, and an orderly stop of jobs."""

import ctypes
import json
import multiprocessing
import os
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

Summary = dict[str, dict[str, float]]  # metric -> mean, sd, runs

SAVE_SECONDS = 60  # for stopped jobs to write their checkpoints
PR_SET_PDEATHSIG = 1  # of prctl: the signal that a process gets when its parent ends
DEFAULT_HANDLERS: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


class SweepSummary(Callback):
    """Write ``summary.json`` into the sweep's folder: mean ± sd of each metric over seeds, by setting if there are several."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Summarize the jobs found on disk, and exit with 1 if one of them failed."""
        from tercet.app import record
        from tercet.app.commands import compare
        from tercet.messages import print_status

        root = Path(config.hydra.sweep.dir)
        jobs = sorted((folder for folder in root.glob("*") if folder.name.isdigit()), key=lambda folder: int(folder.name))
        if not jobs:
            return
        done = [folder for folder in jobs if (folder / "metrics.json").is_file()]
        groups: dict[str, list[dict[str, float]]] = {}
        for folder in done:
            given = OmegaConf.select(OmegaConf.load(folder / "config.yaml"), "command") or []
            setting = " ".join(override for override in given if not override.startswith("seed="))
            groups.setdefault(setting, []).append(record.read_metrics(folder))
        summaries = {differing_overrides(setting, list(groups)): summarize(runs) for setting, runs in groups.items()}
        if len(groups) > 1:
            comparison = compare.group_runs(compare.read_runs(done))
            compare.write_comparison(comparison, comparison.metrics(), root)
        elif groups:
            _show_summary(summaries[""], len(done), config.stages, root)
        failed = [folder for folder in jobs if folder not in done]
        for folder in failed:
            print_status(f"job {folder.name} failed: {folder / 'error.txt'}")
        content = summaries if len(groups) > 1 else summaries.get("", {})
        (root / "summary.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        print_status(f"Written to {root / 'summary.json'}")
        if any((folder / "error.txt").is_file() for folder in failed):
            raise SystemExit(1)  # the command line sees failures of jobs in its own process only


def _show_summary(summary: Summary, runs: int, stages: DictConfig, root: Path) -> None:
    from tercet.app.commands.stages import draw_stages
    from tercet.app.record import stage_metrics
    from tercet.messages import print_status

    names = [name for name, stage in stages.runs.items() if stage is not None]
    print_status("\n" + summary_table(summary, runs, names[:-1]))  # the last stage's metrics are the test's
    if names:
        means, sds = (
            {stage: stage_metrics({n: x[key] for n, x in summary.items()}, stage) for stage in ("before", *names)}
            for key in ("mean", "sd")
        )
        draw_stages(means, stages, sds).savefig(root / "stages.png", dpi=150)


def differing_overrides(setting: str, settings: list[str]) -> str:
    """The overrides of ``setting`` that are not in all ``settings``.

    >>> differing_overrides("data=text view=crop", ["data=text view=crop", "data=text view=dropout"])
    'view=crop'
    """
    common = set.intersection(*(set(other.split(" ")) for other in settings))
    return " ".join(override for override in setting.split(" ") if override not in common)


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


class StopJobs(Callback):
    """Pass Ctrl-C and SIGTERM on to the jobs of joblib, and wait until they have written their checkpoints."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Install the handlers in the process that starts the jobs."""
        if "joblib" in str(config.hydra.launcher._target_):
            for number, default in DEFAULT_HANDLERS.items():
                if signal.getsignal(number) is default:  # keep a handler of the caller, and SIG_IGN
                    signal.signal(number, _stop_jobs)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Restore the handlers."""
        for number, default in DEFAULT_HANDLERS.items():
            if signal.getsignal(number) is _stop_jobs:
                signal.signal(number, default)

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """In the process of a job: end it when the sweep's process is killed."""
        if _is_joblib_worker() and sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def exit_stopped_job() -> None:
    """End the process of a stopped job if it is a worker of joblib, which would give it the next job."""
    if _is_joblib_worker():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(128 + signal.SIGTERM)


def _is_joblib_worker() -> bool:
    return multiprocessing.current_process().name.startswith("LokyProcess")


def _stop_jobs(number: int, frame: FrameType | None) -> None:
    for handled in DEFAULT_HANDLERS:
        signal.signal(handled, signal.SIG_IGN)
    jobs, end = multiprocessing.active_children(), time.monotonic() + SAVE_SECONDS
    for job in jobs:
        job.terminate()
    running: set[Any] = {job.sentinel for job in jobs}
    while running and (left := end - time.monotonic()) > 0:
        running -= set(wait(running, left))
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + signal.SIGTERM)
