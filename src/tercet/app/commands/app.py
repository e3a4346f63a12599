"""The command ``app``: ``serve``, and a page that shows what one model or two make of texts or images, and all runs."""

import math
import tempfile
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset, load_from_disk
from omegaconf import DictConfig, OmegaConf

from tercet.app.commands import serve
from tercet.app.commands.evaluate import open_model
from tercet.app.components import build, check_values
from tercet.app.run_files import read_curves
from tercet.app.run_list import Run, differences, list_runs
from tercet.errors import InputError, check_choice, require
from tercet.messages import print_status, without_progress_bars
from tercet.serving import create_app, require_serving
from tercet.serving.explorer import Collection, Explorer, View, encode_collection, keep_readable, make_view, spread
from tercet.serving.service import Service
from tercet.types import Source


class RunList:
    """The runs of a folder as plain values, by their paths in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def table(self) -> list[dict[str, Any]]:
        """All runs, the newest first; none where there is no such folder yet."""
        return [self._shown(run) for run in self._runs()]

    def curves(self, name: str) -> dict[str, list[tuple[float, float]]]:
        """The curves of a run, without numbers that are not finite."""
        found = read_curves(self._find(name).folder)
        return {key: [(x, y) for x, y in pairs if math.isfinite(y)] for key, pairs in found.items()}

    def differences(self, first: str, second: str) -> list[tuple[str, Any, Any]]:
        """What differs, in words."""
        rows = differences(self._find(first), self._find(second))
        return [(key, _words(one), _words(other)) for key, one, other in rows]

    def _runs(self) -> list[Run]:
        return list_runs(self.folder) if self.folder.is_dir() else []

    def _find(self, name: str) -> Run:
        found = next((run for run in self._runs() if self._name(run) == name), None)
        if found is None:
            raise InputError("There is no such run any more.")
        return found

    def _name(self, run: Run) -> str:
        return str(run.folder.relative_to(self.folder)) if run.folder.is_relative_to(self.folder) else str(run.folder)

    def _shown(self, run: Run) -> dict[str, Any]:
        value = run.metrics.get(run.main_metric or "")
        return {
            "id": self._name(run), "state": run.state, "name": str(run.name), "seed": run.seed, "started": run.started,
            "command": " ".join(run.command), "error": run.error,
            "result": "" if value is None else f"{run.main_metric} {value:.4g}",
        }  # fmt: skip


def _words(value: Any) -> str | None:
    return None if value is None else str(value)


def run(cfg: DictConfig, output: Path) -> None:
    """Embed the texts or images by each model, and serve until SIGTERM or Ctrl-C."""
    require_serving()
    require(cfg.workers == 1, f"workers={cfg.workers}: the page is served by one process.")
    require(cfg.points >= 10, f"points={cfg.points}: 10 or more are needed.")
    check_choice("projection", cfg.projection, ("pca", "tsne"))
    check_choice("split", cfg.split, ("test", "train"))
    settings = serve.serving_settings(cfg, build(cfg.limits))
    collection = read_collection(cfg)
    require(not (cfg.index and collection.read_cell), f"index={cfg.index} is searched by texts; data holds images.")
    limits, latency = settings.options["limits"], cfg.latency_ms
    named = {"model": cfg.model.path, "other": cfg.other} if cfg.other else {"model": cfg.model.path}
    paths, trust = list(named.values()), cfg.model.trust_remote_code
    models = [open_model(path, cfg.model.pooling, cfg.device, trust_remote_code=trust, key=key) for key, path in named.items()]
    held = "images" if collection.read_cell else "texts"
    for (key, path), each in zip(named.items(), models, strict=True):
        read = "images" if each.kind == "image" else "texts"
        require(read == held, f"{key}={path} reads {read}, but data holds {held}. Choose others by {key}=... or data=...")
    try:
        collection, vectors = keep_readable(collection, [encode_collection(each, collection) for each in models])
    except InputError as error:
        raise InputError(error.rename({"collection": "data", "items": "data"})) from error
    views: list[View] = []
    for path, each, z in zip(paths, models, vectors, strict=True):
        service = None if collection.read_cell else Service(each, None, limits, latency)
        views.append(make_view(str(path), z, service, cfg.projection, views[0] if views else None))
    index = serve.open_index(cfg.index, models[0]) if cfg.index else None
    runs = RunList(Path(cfg.outputs)) if cfg.outputs else None
    app = create_app(models[0], index, explorer=Explorer(collection, views), runs=runs, **settings.options)
    with serve.listen(cfg.host, cfg.port) as listener:
        place = serve.address(cfg.host, listener)
        print_status(f"{len(collection.texts)}{collection.part or f' {held}'}. The page: {place}/")
        serve.serve_app(app, limits, listener, place)


def read_collection(cfg: DictConfig) -> Collection:
    """The texts or images of the data set, with its labels or its pairs."""
    test = OmegaConf.to_container(cfg.data.test, resolve=True) if cfg.data.get("test") else None
    holds_out = isinstance(test, dict) and not (test.get("split") == "test" and test.get("held_out") == 0)
    part = "test" if cfg.split == "test" and holds_out else "train"
    node = OmegaConf.to_container(cfg.data[part], resolve=True)
    check_values(OmegaConf.create({"data": {part: node}}), cfg)
    source: Source = build(cfg.data[part])
    rows = source.rows()
    first = next(iter(rows), None)
    require(first, "data: there are no rows.")
    assert first is not None
    labels = None
    if "label" in rows.column_names:
        names = getattr(rows.features["label"], "names", None)
        labels = ["" if x is None or x < 0 else names[x] if names else str(x) for x in rows["label"]]
    if not isinstance(first[source.columns[0]], str):
        made = read_images(rows, source.columns[0], labels, cfg.points)
        return replace(made, part=describe_part(source, len(rows), 1, cfg.points, "images"))
    columns = {name: list(rows[name]) for name in list(source.columns)[:2]}
    part = describe_part(source, len(rows), len(columns), cfg.points, "texts")
    return replace(Collection.of_columns(columns, labels, cfg.points), part=part)


def describe_part(source: Any, count: int, num_columns: int, points: int, unit: str) -> str:
    """What follows the number of ``unit`` shown where that is not all: of how many, which they are, and what shows others."""
    split, total = getattr(source, "split", None), count
    why: list[str] = []
    if split in ("test", "train") and is_dataclass(source) and (split == "test" or vars(source).get("held_out")):
        every: Any = replace(source, split="all")  # type: ignore[type-var]
        total = len(every.rows())
        which = {"test": "held-out rows; split=train shows the others", "train": "without held-out rows; split=test shows them"}
        why = [which[split]] if total > count else []
    if count * num_columns > points:
        why.append(f"spread evenly; points={points} is the most")
    return f" of {total * num_columns} {unit} ({', '.join(why)})" if why else ""


def read_images(rows: Dataset, column: str, labels: list[str] | None, limit: int) -> Collection:
    """At most ``limit`` images, named by their files or rows; those that Parquet holds go from memory to a temporary file."""
    chosen = spread(len(rows), limit)
    rows = rows.select_columns(column).select(chosen)
    files = rows.flatten()[f"{column}.path"]
    names = [Path(file).name if file else f"image {row}" for file, row in zip(files, chosen, strict=True)]
    temporary = tempfile.TemporaryDirectory(prefix="tercet-images-", ignore_cleanup_errors=True)
    with temporary as folder, without_progress_bars():
        try:
            rows.save_to_disk(folder)
        except OSError as error:
            advice = "Name a larger folder in the environment variable TMPDIR, or show fewer."
            raise InputError(f"points={limit}: images cannot be written to {folder} ({error}). {advice}") from error
        rows = load_from_disk(folder)  # mapped: what is deleted here goes from the disk when the process ends, however it does
    given = [labels[row] for row in chosen] if labels is not None else [""] * len(chosen)
    return Collection(names, given, read_cell=lambda row: rows[row][column])
