"""The end of a multirun: mean ± sd over its jobs."""

import json
import statistics
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from tercet.console import say


class Summary(Callback):
    """Reads the jobs' ``metrics.json`` and writes ``summary.json`` beside them."""

    def __init__(self) -> None:
        self.folders: list[Path] = []

    def on_job_end(self, config: DictConfig, job_return: Any, **kwargs: Any) -> None:
        """Remember where the job wrote."""
        self.folders.append(Path(job_return.hydra_cfg.hydra.runtime.output_dir))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the table."""
        done = [folder for folder in self.folders if (folder / "metrics.json").is_file()]
        runs = [json.loads((folder / "metrics.json").read_text(encoding="utf-8")) for folder in done]
        if not self.folders:
            return
        summary = summarize(runs)
        root = self.folders[0].parent
        (root / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        say("\n" + table(summary, len(done)))
        for folder in self.folders:
            if folder not in done:
                say(f"job {folder.name} failed: {(folder / 'error.txt')}")
        say(f"Written to {root / 'summary.json'}")


def summarize(runs: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Metric to its mean, standard deviation (n - 1) and number of runs."""
    names = sorted({name for run in runs for name in run if name.startswith(("before/", "test/"))})
    found = {}
    for name in names:
        values = [run[name] for run in runs if name in run]
        sd = statistics.stdev(values) if len(values) > 1 else 0.0
        found[name] = {"mean": statistics.fmean(values), "sd": sd, "runs": len(values)}
    return found


def table(summary: dict[str, dict[str, float]], runs: int) -> str:
    """The test metrics, and what they were before, as text."""
    tests = [name.removeprefix("test/") for name in summary if name.startswith("test/")]
    width = max(map(len, tests), default=0)
    lines = [f"mean ± sd over {runs} runs", f"{'':{width}}  {'before':>17}      {'after':>17}"]
    for name in tests:
        before, after = (_cell(summary.get(f"{stage}/{name}")) for stage in ("before", "test"))
        lines.append(f"{name:{width}}  {before:>17}  →   {after:>17}")
    return "\n".join(lines)


def _cell(entry: dict[str, float] | None) -> str:
    return "" if entry is None else f"{entry['mean']:.4f} ± {entry['sd']:.4f}"
