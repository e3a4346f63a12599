"""The command ``app``: ``serve``, and a page that shows what one model or two make of texts, and all runs."""

import math
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from tercet.app.commands import serve
from tercet.app.commands.evaluate import open_model
from tercet.app.components import build, check_values
from tercet.app.run_files import read_curves
from tercet.app.run_list import Run, differences, list_runs
from tercet.errors import InputError, check_choice, require
from tercet.messages import print_status, silence_libraries
from tercet.serving import create_app, require_serving
from tercet.serving.explorer import Collection, Explorer, View, encode_collection, make_view
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
    """Embed the texts by each model, and serve until SIGTERM or Ctrl-C."""
    require_serving()
    silence_libraries()
    require(cfg.workers == 1, f"workers={cfg.workers}: the page is served by one process.")
    require(cfg.points >= 10, f"points={cfg.points}: 10 or more are needed.")
    check_choice("projection", cfg.projection, ("pca", "tsne"))
    check_choice("split", cfg.split, ("test", "train"))
    settings = serve.serving_settings(cfg, build(cfg.limits))
    collection = read_collection(cfg)
    limits, latency = settings.options["limits"], cfg.latency_ms
    views: list[View] = []
    model = None
    for path in (cfg.model.path, cfg.other) if cfg.other else (cfg.model.path,):
        opened = open_model(path, cfg.model.pooling, cfg.device, trust_remote_code=cfg.model.trust_remote_code)
        model = model or opened
        service, first = Service(opened, None, limits, latency), views[0] if views else None
        views.append(make_view(str(path), encode_collection(opened, collection), service, cfg.projection, first))
    assert model is not None
    index = serve.open_index(cfg.index, model) if cfg.index else None
    runs = RunList(Path(cfg.outputs)) if cfg.outputs else None
    app = create_app(model, index, explorer=Explorer(collection, views), runs=runs, **settings.options)
    with serve.listen(cfg.host, cfg.port) as listener:
        place = serve.address(cfg.host, listener)
        print_status(f"{len(collection.texts)} texts. The page: {place}/")
        serve.serve_app(app, limits, listener, place)


def read_collection(cfg: DictConfig) -> Collection:
    """The texts of the data set, with its labels or its pairs."""
    part = "test" if cfg.split == "test" and cfg.data.get("test") else "train"
    node = OmegaConf.to_container(cfg.data[part], resolve=True)
    check_values(OmegaConf.create({"data": {part: node}}), cfg)
    source: Source = build(cfg.data[part])
    rows = source.rows()
    columns = {name: list(rows[name]) for name in list(source.columns)[:2]}
    first = next(iter(columns.values()))
    require(first, "data: there are no rows.")
    require(isinstance(first[0], str), "data: the page shows texts; this data holds images.")
    labels = None
    if "label" in rows.column_names:
        names = getattr(rows.features["label"], "names", None)
        labels = ["" if x is None or x < 0 else names[x] if names else str(x) for x in rows["label"]]
    return Collection.of_columns(columns, labels, cfg.points)
