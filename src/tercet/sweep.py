"""The end of a multirun: mean ± sd over the seeds of each setting."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from tercet import record
from tercet.console import say

Runs = list[dict[str, float]]


class Summary(Callback):
    """Reads the jobs' ``metrics.json`` and writes ``summary.json`` beside them: by setting, where there are several."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the table: of what lies on the disk, whoever ran it."""
        from tercet import compare  # numpy; sweeps are imported before anything is known
        from tercet import runs as finished

        root = Path(config.hydra.sweep.dir)
        jobs = (
            sorted((p for p in root.iterdir() if p.name.isdigit()), key=lambda p: int(p.name)) if root.is_dir() else []
        )
        if not jobs:
            return
        done = [(_setting(folder), folder) for folder in jobs if (folder / "metrics.json").is_file()]
        groups: dict[str, Runs] = {}
        for setting, folder in done:
            groups.setdefault(setting, []).append(record.read(folder))
        summaries = {told(setting, list(groups)): summarize(runs) for setting, runs in groups.items()}
        if len(groups) > 1:
            compared = compare.group(finished.read([folder for _, folder in done]))
            compare.write(compared, compared.metrics(), root)
        elif groups:
            stages = [name for name, stage in config.stages.runs.items() if stage is not None]
            say("\n" + table(next(iter(summaries.values())), len(done), stages[:-1]))  # the last one's is the test's
            if stages:
                self._draw(next(iter(summaries.values())), config.stages, stages, root)
        for folder in jobs:
            if not (folder / "metrics.json").is_file():
                say(f"job {folder.name} failed: {(folder / 'error.txt')}")
        written = summaries if len(groups) > 1 else next(iter(summaries.values()), {})
        (root / "summary.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
        say(f"Written to {root / 'summary.json'}")
        if any((f / "error.txt").is_file() and not (f / "metrics.json").is_file() for f in jobs):
            raise SystemExit(1)  # main knows of jobs in its own process only

    def _draw(self, summary: dict[str, Any], settings: DictConfig, stages: list[str], root: Path) -> None:
        from tercet.stages import draw  # heavy; sweeps are imported before anything is known

        columns = {
            stage: {
                n.removeprefix(f"{stage}/"): (x["mean"], x["sd"]) for n, x in summary.items() if n.startswith(stage)
            }
            for stage in ("before", *stages)
        }
        draw(columns, settings).savefig(root / "stages.png", dpi=150)


def _setting(folder: Path) -> str:
    """What a job's command set, its seed aside."""
    typed = OmegaConf.select(OmegaConf.load(folder / "config.yaml"), "command") or []
    return " ".join(part for part in typed if not part.startswith("seed="))


def told(setting: str, all_: list[str]) -> str:
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


def table(summary: dict[str, dict[str, float]], runs: int, others: Sequence[str] = ()) -> str:
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
