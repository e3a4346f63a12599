"""The command ``runs``: list, best, show, diff, tail and prune. Imports here are light: it answers at once."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from omegaconf import DictConfig

from tercet.app.run_files import is_alive, process_is_gone, read_curves
from tercet.app.run_list import STATES, Run, best_runs, differences, find_run, folder_size, list_runs, remove_run
from tercet.errors import InputError, did_you_mean, require
from tercet.messages import format_mean_sd, printable

POLL_SECONDS = 1.0  # of `tail`
PRUNED = ("failed", "dead")


def run(cfg: DictConfig, output: Path) -> None:
    """Do what the first of ``cfg.words`` says with the runs that the others name."""
    action, *names = [str(word) for word in cfg.words] or ["list"]
    require(action in ACTIONS, f"runs {action}: choose one of {', '.join(ACTIONS)}.{did_you_mean(action, list(ACTIONS))}")
    function, count, what = ACTIONS[action]
    require(len(names) == count, f"runs {action} takes {what}, not {len(names)} names: {' '.join(names) or 'none were given'}.")
    states = [cfg.state] if isinstance(cfg.state, str) else list(cfg.state or STATES)
    unknown = ", ".join(str(state) for state in states if state not in STATES)
    require(not unknown, f"state={unknown}: choose some of {', '.join(STATES)}.")
    function(cfg, *names)


def _selected(cfg: DictConfig) -> list[Run]:
    states = [cfg.state] if isinstance(cfg.state, str) else list(cfg.state or STATES)
    return [one for one in list_runs(cfg.folder) if one.state in states and cfg.run_name in (None, one.name)]


def _list(cfg: DictConfig) -> None:
    runs = _selected(cfg)
    groups: dict[Path, list[Run]] = {}
    for one in runs:
        groups.setdefault(one.folder if cfg.jobs or not one.sweep else one.sweep, []).append(one)
    shown = list(groups.items())[: cfg.last]
    rows = [_row(folder, members, cfg.metric) for folder, members in shown]
    _print_table(["state", "started", "run", "seed", "metric", ""], rows)
    counts = Counter(one.state for one in runs)
    counted = ", ".join(f"{counts[state]:,} {state}" for state in STATES if counts[state])
    left = len(groups) - len(shown)
    print(f"{len(runs):,} runs{f': {counted}' if counted else ''}" + f"; {left:,} rows more: last=null shows all" * bool(left))


def _row(folder: Path, members: Sequence[Run], metric: str | None) -> list[str]:
    """The row of a run, or of a sweep's jobs."""
    first = members[0]
    if folder == first.folder:
        state, seed = first.state, _value(first.seed)
    else:
        counts = Counter(one.state for one in members)
        state = " ".join(f"{counts[name]} {name}" for name in STATES if counts[name])
        seed = f"{len(members)} jobs"
    name = metric or first.main_metric or next((one.main_metric for one in members if one.main_metric), None)
    values = [one.metrics[name] for one in members if name in one.metrics] if name else []
    cells = [name, format_mean_sd(values)] if name and values else ["", ""]
    if first.error and first.state != "finished" and not values:
        cells = [f"{first.error.splitlines()[0]:.60}", ""]
    return [state, _when(first.started), str(folder), seed, *cells]


def _best(cfg: DictConfig) -> None:
    require(cfg.metric, "metric must be given: tercet runs best metric=test/...")
    runs = best_runs(_selected(cfg), cfg.metric)[: cfg.last]
    rows = [[f"{one.metrics[cfg.metric]:.4f}", str(one.folder), _value(one.seed), " ".join(one.command)] for one in runs]
    _print_table([cfg.metric, "run", "seed", "command"], rows)


def _show(cfg: DictConfig, name: str) -> None:
    one = find_run(name, cfg.folder)
    owner = " (its process is not there any more)" if one.state == "dead" and process_is_gone(one.folder) else ""
    lines = [("run", str(one.folder)), ("state", one.state + owner), ("error", one.error), ("experiment", one.name),
             ("seed", _value(one.seed)), ("command", " ".join(["tercet train", *one.command])), ("started", _when(one.started)),
             ("last written", _when(one.updated)), ("sweep", str(one.sweep or "")),
             ("size", f"{folder_size(one.folder):,} bytes")]  # fmt: skip
    _print_table([], [[name, text] for name, text in lines if text])
    stages = list(dict.fromkeys(name.split("/")[0] for name in one.metrics))
    names = dict.fromkeys(name.partition("/")[2] for name in one.metrics)
    cells = [[name, *(_value(one.metrics.get(f"{stage}/{name}")) for stage in stages)] for name in names]
    if cells:
        print()
        _print_table(["", *stages], cells)


def _diff(cfg: DictConfig, first: str, second: str) -> None:
    one, other = find_run(first, cfg.folder), find_run(second, cfg.folder)
    rows = [[key, _value(x), _value(y)] for key, x, y in differences(one, other)]
    if rows:
        _print_table(["", str(one.folder), str(other.folder)], rows)
    else:
        print("The runs have the same settings and metrics.")


def _tail(cfg: DictConfig, name: str) -> None:
    """Print the rows of ``metrics.csv``, the last ones first seen, and go on until the run has ended."""
    one = find_run(name, cfg.folder)
    printed, left = float("-inf"), cfg.last
    while True:
        alive = is_alive(one.folder)  # before the file is read: what the run writes last is not missed
        steps: dict[float, list[str]] = {}
        for column, points in read_curves(one.folder).items():
            for step, value in points:
                steps.setdefault(step, []).append(f"{column} {_value(value)}")
        fresh = sorted(step for step in steps if step > printed)
        for step in fresh[-left:] if left else fresh:
            print(printable(f"step {step:g}  {'  '.join(steps[step])}", lines=False), flush=True)
        printed, left = max([printed, *fresh]), None
        if not alive:
            break
        time.sleep(POLL_SECONDS)
    one = find_run(str(one.folder))
    what = f": {one.error}" if one.error and one.state == "failed" else ""
    print(printable(f"{one.folder} is {one.state}{what}") + " (it has no metrics.csv: logger=csv writes one)" * (not steps))


def _prune(cfg: DictConfig) -> None:
    wanted = PRUNED if cfg.state is None else ()
    before = time.time() - 86400 * (cfg.older_than or 0)
    chosen = [one for one in _selected(cfg) if (not wanted or one.state in wanted) and one.updated <= before]
    running = [one for one in chosen if one.state == "running"]
    require(not running, f"state=running: a running run is never deleted; end it first ({len(running)} of them).")
    sizes = {one.folder: folder_size(one.folder) for one in chosen}
    _print_table(["state", "started", "run", "bytes"],
                 [[one.state, _when(one.started), str(one.folder), f"{sizes[one.folder]:,}"] for one in chosen])  # fmt: skip
    if not cfg.yes:
        print(f"{len(chosen):,} runs, {sum(sizes.values()):,} bytes. Nothing was deleted: --yes deletes them.")
        return
    freed, kept = 0, list[str]()
    for one in chosen:
        try:
            freed += remove_run(one, Path(cfg.folder))
        except (InputError, OSError) as error:  # noqa: PERF203
            kept.append(str(error))
    print(f"{len(chosen) - len(kept):,} runs deleted, {freed:,} bytes freed.")
    require(not kept, " ".join(kept))


ACTIONS: dict[str, tuple[Callable[..., None], int, str]] = {
    "list": (_list, 0, "no names"), "best": (_best, 0, "no names"), "show": (_show, 1, "one run"),
    "diff": (_diff, 2, "two runs"), "tail": (_tail, 1, "one run"), "prune": (_prune, 0, "no names"),
}  # fmt: skip


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds)) if seconds else ""


def _value(value: object) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _print_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows of cells in columns as wide as their widest cell."""
    cells = [[printable(cell, lines=False) for cell in row] for row in ([head] if head else []) + list(rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        print("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
