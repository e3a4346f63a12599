"""The end of a multirun: mean ± sd over the seeds of each setting."""

import ctypes
import json
import multiprocessing
import os
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from tercet.app import record
from tercet.messages import print_status

Runs = list[dict[str, float]]


class SweepSummary(Callback):
    """Reads the jobs' ``metrics.json`` and writes ``summary.json`` beside them: by setting, where there are several."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the table: of what lies on the disk, whoever ran it."""
        from tercet.app.commands import compare
        from tercet.app.commands import compare as finished

        root = Path(config.hydra.sweep.dir)
        jobs = sorted((p for p in root.iterdir() if p.name.isdigit()), key=lambda p: int(p.name)) if root.is_dir() else []
        if not jobs:
            return
        done = [(_setting(folder), folder) for folder in jobs if (folder / "metrics.json").is_file()]
        groups: dict[str, Runs] = {}
        for setting, folder in done:
            groups.setdefault(setting, []).append(record.read_metrics(folder))
        summaries = {differing_overrides(setting, list(groups)): summarize(runs) for setting, runs in groups.items()}
        if len(groups) > 1:
            compared = compare.group_runs(finished.read_runs([folder for _, folder in done]))
            compare.write_comparison(compared, compared.metrics(), root)
        elif groups:
            stages = [name for name, stage in config.stages.runs.items() if stage is not None]
            print_status(
                "\n" + summary_table(next(iter(summaries.values())), len(done), stages[:-1])
            )  # the last one's is the test's
            if stages:
                self._draw(next(iter(summaries.values())), config.stages, stages, root)
        for folder in jobs:
            if not (folder / "metrics.json").is_file():
                print_status(f"job {folder.name} failed: {(folder / 'error.txt')}")
        written = summaries if len(groups) > 1 else next(iter(summaries.values()), {})
        (root / "summary.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
        print_status(f"Written to {root / 'summary.json'}")
        if any((f / "error.txt").is_file() and not (f / "metrics.json").is_file() for f in jobs):
            raise SystemExit(1)  # main knows of jobs in its own process only

    def _draw(self, summary: dict[str, Any], settings: DictConfig, stages: list[str], root: Path) -> None:
        from tercet.app.commands.stages import draw_stages

        columns = {
            stage: {n.removeprefix(f"{stage}/"): (x["mean"], x["sd"]) for n, x in summary.items() if n.startswith(stage)}
            for stage in ("before", *stages)
        }
        draw_stages(columns, settings).savefig(root / "stages.png", dpi=150)


def _setting(folder: Path) -> str:
    """What a job's command set, its seed aside."""
    typed = OmegaConf.select(OmegaConf.load(folder / "config.yaml"), "command") or []
    return " ".join(part for part in typed if not part.startswith("seed="))


def differing_overrides(setting: str, all_: list[str]) -> str:
    """What of a setting is not the same in all of them."""
    same = set.intersection(*(set(other.split(" ")) for other in all_))
    return " ".join(part for part in setting.split(" ") if part not in same)


def summarize(runs: Runs) -> dict[str, dict[str, float]]:
    """Metric to its mean, standard deviation (n - 1) and number of runs; training's own are left out."""
    names = sorted({name for run in runs for name in run if not name.startswith(("train/", "val/"))})
    found = {}
    for name in names:
        values = [run[name] for run in runs if name in run]
        sd = statistics.stdev(values) if len(values) > 1 else 0.0
        found[name] = {"mean": statistics.fmean(values), "sd": sd, "runs": len(values)}
    return found


def summary_table(summary: dict[str, dict[str, float]], runs: int, others: Sequence[str] = ()) -> str:
    """The test metrics, and what they were before, and after the stages ``others``, as text."""
    tests = [name.removeprefix("test/") for name in summary if name.startswith("test/")]
    width = max(map(len, tests), default=0)
    head = "".join(f"{name:>17}  →   " for name in ("before", *others))
    lines = [f"mean ± sd over {runs} runs", f"{'':{width}}  {head}{'after':>17}"]
    for name in tests:
        cells = "".join(f"{_cell(summary.get(f'{stage}/{name}')):>17}  →   " for stage in ("before", *others))
        lines.append(f"{name:{width}}  {cells}{_cell(summary[f'test/{name}']):>17}")
    return "\n".join(lines)


def _cell(entry: dict[str, float] | None) -> str:
    return "" if entry is None else f"{entry['mean']:.4f} ± {entry['sd']:.4f}"


SAVING = 60  # seconds that stopped jobs have for their checkpoints
PARENT_DIES = 1  # prctl's PR_SET_PDEATHSIG
DEFAULTS: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


class StopJobs(Callback):
    """Ctrl-C and SIGTERM go to the jobs first, and count once these have saved and ended."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """In the process that hands out the jobs."""
        if "joblib" in str(config.hydra.launcher._target_):
            for number, default in DEFAULTS.items():
                if signal.getsignal(number) is default:  # else it is ignored, or somebody's own
                    signal.signal(number, _pass_on)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """There is nobody left to tell."""
        for number, default in DEFAULTS.items():
            if signal.getsignal(number) is _pass_on:
                signal.signal(number, default)

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """In the process of a job: a sweep that is killed leaves none behind."""
        if _of_joblib() and sys.platform == "linux":
            ctypes.CDLL(None).prctl(PARENT_DIES, signal.SIGTERM)


def exit_stopped_job() -> None:
    """End the process of a job that was stopped: joblib would give it the next one. Elsewhere nothing is done."""
    if _of_joblib():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(128 + signal.SIGTERM)


def _of_joblib() -> bool:
    return multiprocessing.current_process().name.startswith("LokyProcess")


def _pass_on(number: int, frame: FrameType | None) -> None:
    for known in DEFAULTS:
        signal.signal(known, signal.SIG_IGN)
    jobs = multiprocessing.active_children()
    for job in jobs:
        if job.pid:
            with suppress(ProcessLookupError):
                os.kill(job.pid, signal.SIGTERM)
    running, ends = [job.sentinel for job in jobs], time.monotonic() + SAVING
    while running and (left := ends - time.monotonic()) > 0:
        ended = wait(running, left)
        running = [sentinel for sentinel in running if sentinel not in ended]
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + signal.SIGTERM)
