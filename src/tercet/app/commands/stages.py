"""The command ``train`` with stages: several runs as one, each from the model of the one before."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf, read_write

from tercet.app import record, run_files, run_folder, signals
from tercet.app.commands import train
from tercet.app.hydra_compat import quote, typed_overrides
from tercet.app.run_files import is_smaller_better
from tercet.errors import require
from tercet.evaluation.direction import SMALLER_IS_BETTER
from tercet.evaluation.figures import figure_text, make_axes
from tercet.messages import print_status
from tercet.paths import atomic_write, check_writable, write_text

OWN = ("experiment", "stages", "init_from", "output_dir", "resume", "optimized_metric", "name", "measure_before")
COUNTS = ("trainer", "test")  # beside what changes results: a finished stage is kept where these are the same
START = "before"

Columns = Mapping[str, Mapping[str, float]]  # stage -> metric -> value


def run(cfg: DictConfig, output: Path) -> float | None:
    """Run the stages that are not null, each in a folder of its own; returns the optimized metric.

    What was set on the command line is set in every stage. With ``resume`` finished stages are kept.
    """
    runs = {str(name): stage for name, stage in cfg.stages.runs.items() if stage is not None}
    require(runs, "stages.runs: every stage is null. Set one of them, or use another experiment.")
    for name, stage in runs.items():
        require(OmegaConf.is_dict(stage), f"stages.runs.{name}={stage}: a group of keys is needed, what is set in this stage.")
    taken = {START, "test", "train", "val"} & runs.keys()
    require(not taken, f"stages.runs: a stage may not be called {' or '.join(taken)}. Rename it.")
    check_writable(output, "output_dir")
    folders = {name: output / f"{number}_{name}" for number, name in enumerate(runs, 1)}
    with run_folder.locked(output):
        _check_folder(cfg, output, list(folders.values()))
        go_on = f"The same command with output_dir={shlex.quote(str(output))} resume=true continues"
        signals.describe_stop(lambda: f"; finished stages and checkpoints are kept. {go_on}.")
        for name, stage in runs.items():  # an error in the last stage is found before the first one trains
            train.prepare(compose_stage(stage, None, folders[name]), output)
        return _run_stages(cfg, output, runs, folders)


def _run_stages(cfg: DictConfig, output: Path, runs: dict[str, DictConfig], folders: dict[str, Path]) -> float | None:
    columns: dict[str, dict[str, float]] = {}
    start, measured = cfg.init_from, None
    for number, (name, folder) in enumerate(folders.items(), 1):
        config = compose_stage(runs[name], start, folder)
        test = OmegaConf.to_container(config.test, resolve=True)
        config.measure_before = bool(cfg.measure_before and test != measured)  # else the last stage has just done so
        config.resume = cfg.resume
        if cfg.resume and run_files.is_finished(folder):
            now, _ = train.prepare(config, folder)
            counts = lambda key: train.changes_results(key) or key.split(".")[0] in COUNTS  # noqa: E731
            other = record.first_difference(run_files.read_settings(folder), now, counts)
            advice = f"Use another output_dir, or delete {folder} and what follows it."
            require(not other, f"{folder.name} was finished with {other}. {advice}")
            print_status(f"{folder.name} is finished; kept")
        else:
            print_status(f"\n{number} of {len(runs)}: {name}")
            train.run(config, folder)
        if cfg.check:  # no model and no metrics: every stage is checked from the start of the first one
            continue
        metrics = run_files.read_metrics(folder)
        after = record.stage_metrics(metrics, "test")
        for key in ("in_domain", "out_of_domain") if not columns else ():
            if (wanted := cfg.stages[key]) and wanted not in after:
                print_status(f"stages.{key}={wanted} is not measured; the figure lacks it. There are: {', '.join(after)}.")
        if START not in columns and config.measure_before:
            columns[START] = record.stage_metrics(metrics, START)
        columns[name] = after
        start, measured = str(folder / "model"), test
    return None if cfg.check else _finish(cfg, output, columns, start)


def _check_folder(cfg: DictConfig, output: Path, folders: list[Path]) -> None:
    if record.is_main_process():
        if not cfg.resume and not cfg.check and run_folder.holds_run(output):
            run_folder.set_aside(output)
        found = sorted(p for p in output.glob("*_*") if p.is_dir() and p.name.split("_")[0].isdigit())
        other, now = (", ".join(path.name for path in paths) for paths in (sorted({*found} - {*folders}), folders))
        advice = "Use the same stages.runs, or another output_dir."
        require(not other, f"resume=true: {output} holds {other}; the stages are {now} now. {advice}")


def compose_stage(stage: DictConfig, start: str | None, folder: Path) -> DictConfig:
    """Compose a stage's configuration: its own keys, then those of the command line, on the experiment that it names."""
    hydra: Any = HydraConfig.get()  # what ${hydra:...} looks into
    with read_write(hydra):
        hydra.runtime.output_dir = str(folder)
    given = {o.lstrip("+~").split("=")[0]: o for o in typed_overrides()}
    given = {key: o for key, o in given.items() if key.split(".")[0] not in OWN}
    own = {"experiment": "~experiment"}
    settings: Any = OmegaConf.to_container(stage, resolve=True)
    for key, value in settings.items():  # {objective: mlm, data: {where: {a: 1}}} is objective=mlm data.where={a:1}
        inner = {f"{key}.{name}": x for name, x in value.items()} if isinstance(value, dict) else {key: value}
        own |= {name: f"{name}={quote(x)}" for name, x in inner.items()}
    return compose("train", [*(own | given).values(), f"init_from={quote(start)}", f"output_dir={quote(str(folder))}"])


def _finish(cfg: DictConfig, output: Path, columns: dict[str, dict[str, float]], model: str) -> float | None:
    """Write the table, figure and metrics of all stages; the last stage's model is the run's."""
    metrics = {f"{stage}/{name}": x for stage, column in columns.items() for name, x in column.items()}
    metrics |= {f"test/{name}": x for name, x in list(columns.values())[-1].items()}
    metrics |= {name: x for name, x in run_files.read_metrics(Path(model).parent).items() if name.startswith("val/")}
    if record.is_main_process():
        identity = record.write_settings(output, cfg)
        (output / "model").unlink(missing_ok=True)
        (output / "model").symlink_to(Path(model).relative_to(output))
        text = stage_table(columns, cfg.stages.in_domain, cfg.stages.out_of_domain)
        write_text(output / "stages.txt", text + "\n")
        with atomic_write(output / "stages.png") as partial:
            draw_stages(columns, cfg.stages).savefig(partial, dpi=150)
        record.write_metrics(output, metrics, run=identity)
        print_status(f"\n{text}\n\nWritten to {output}: stages.txt, stages.png, metrics.json, model/")
    if cfg.optimized_metric not in metrics and not any(o.startswith("optimized_metric=") for o in cfg.command or ()):
        cfg.optimized_metric = None  # the experiment's, which stages of one's own need not measure
    return train.optimized_value(cfg, metrics)


def stage_table(columns: Columns, inside: str, outside: str) -> str:
    """One row per metric, one column per stage, and by how much ``outside`` is worse than at the start and than at its best."""
    found = {name: [column.get(name) for column in columns.values()] for some in columns.values() for name in some}
    kept = [x for x in found.get(outside, []) if x is not None]
    rows = {name: found[name] for name in (inside, outside) if name in found}
    if len(kept) == len(columns):
        less = is_smaller_better(outside, SMALLER_IS_BETTER)
        best = [(min if less else max)(kept[: i + 1]) for i in range(len(kept))]
        rows[f"forgotten: {outside}"] = [x - kept[0] if less else kept[0] - x for x in kept]
        rows["  since its best"] = [x - y if less else y - x for x, y in zip(kept, best, strict=True)]
    rows |= found
    width = max(map(len, rows), default=0)
    lines = [" " * width + "".join(f"{name:>14}" for name in columns)]
    for name, values in rows.items():
        lines.append(f"{name:{width}}" + "".join(f"{'' if x is None else f'{x:.4f}':>14}" for x in values))
    return "\n".join(lines)


def draw_stages(columns: Columns, settings: DictConfig, deviations: Columns | None = None) -> Figure:
    """Plot both metrics over the stages, each value with its standard deviation if ``deviations`` are given."""
    shown = [(settings.in_domain, "in the domain", "#1b7f79"), (settings.out_of_domain, "outside it", "#8a5a9e")]
    shown = [part for part in shown if all(part[0] in column for column in columns.values())]
    width = max(1, len(shown))
    figure, panels = make_axes(4.2 * width, 3.2, 1, width, len(shown))
    for axes, (name, title, color) in zip(panels, shown, strict=True):
        values = [column[name] for column in columns.values()]
        sds = [column[name] for column in deviations.values()] if deviations else [0.0] * len(values)
        stages = [figure_text(stage) for stage in columns]
        axes.errorbar(stages, values, yerr=sds if any(sds) else None, color=color, marker="o", capsize=3)
        for x, (y, sd) in enumerate(zip(values, sds, strict=True)):
            low = y < max(values[max(0, x - 1) : x + 2])  # the line comes down to it: write below
            end, offset, side = (x, y - sd if low else y + sd), (0, -7 if low else 7), "top" if low else "bottom"
            axes.annotate(f"{y:.3f}", end, xytext=offset, textcoords="offset points", va=side, ha="center", fontsize=8)
        axes.axhline(values[0], color="#c9c9c9", lw=0.8, zorder=0)
        axes.margins(x=0.12, y=0.25)
        axes.set_title(figure_text(f"{title}: {name}"), fontsize=9)
        axes.tick_params(labelsize=8)
    return figure
