"""Tasks and benchmarks of mteb (Muennighoff et al. 2023, arXiv:2210.07316), run by mteb itself on any encode function."""

import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from tercet.distributed.gather import rank
from tercet.errors import InputError, did_you_mean, refuse_damaged, require
from tercet.paths import check_writable, locate
from tercet.types import EncodeFunction

MISSING = "mteb is not installed: pip install 'tercet[mteb]'."


@dataclass(frozen=True)
class MTEB:
    """The main score of each of mteb's ``tasks``, the mean over its splits and languages: ``mteb/<task>/<score>``.

    ``tasks`` are names of tasks or of benchmarks (as ``NanoBEIR``), or task objects. Their data sets come from the Hub, or from
    the folder ``path`` with a copy of each under the task's name or that of its repository. ``languages`` (as ``eng``) leaves
    out others. With ``results``, a folder, mteb writes its own files there, which can be submitted under the ``name`` and
    ``revision`` of the model. Prompts are those for the task, for queries and for documents that the model has.

    >>> MTEB(["STSBenchmark"], path="copies")
    Traceback (most recent call last):
    tercet.errors.InputError: path=copies is no folder. Give one with a copy of each task's data set, or leave it out.
    """

    tasks: Sequence[Any]
    path: str | None = None
    languages: Sequence[str] | None = None
    results: str | None = None
    name: str = "tercet/model"
    revision: str = "unknown"
    smaller_is_better: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        require(find_spec("mteb"), MISSING)
        listed = self.tasks and not isinstance(self.tasks, str)
        require(listed, f"`tasks`={self.tasks}: a list of names is needed, as [STSBenchmark].")
        advice = "Give one with a copy of each task's data set, or leave it out."
        require(self.path is None or locate(self.path).is_dir(), f"`path`={self.path} is no folder. {advice}")
        require("/" in self.name.strip("/"), f"`name`={self.name}: mteb's names of models are <organization>/<model>.")
        if self.results:
            check_writable(Path(self.results), "results")

    def __call__(self, encode: EncodeFunction) -> dict[str, float]:
        """Run the tasks, and average them if there are several: ``mteb/mean/main_score``."""
        from tercet.models.interop import FunctionModel  # imports transformers

        library = import_module("mteb")
        write = self.results is not None and rank() == 0
        cache = library.ResultCache(self.results) if write else None
        scores = {}
        with _random_state_kept():
            model = FunctionModel(encode, self.name, self.revision)
            for task in self._tasks(library):
                self._load(task)
                options = {"cache": cache, "overwrite_strategy": "always", "show_progress_bar": False}
                (found,) = library.evaluate(model, task, **options).task_results
                scores[f"mteb/{found.task_name}/{task.metadata.main_score}"] = float(found.get_score())
        mean = {"mteb/mean/main_score": float(np.mean(list(scores.values())))} if len(scores) > 1 else {}
        return {**scores, **mean}

    def _tasks(self, library: Any) -> list[Any]:
        """The tasks, those of benchmarks in their place, each once."""
        benchmarks = {benchmark.name: benchmark for benchmark in library.get_benchmarks()}
        found: list[Any] = []
        for given in self.tasks:
            if not isinstance(given, str):
                found.append(given)
            elif given in benchmarks:
                found += benchmarks[given].tasks
            else:
                try:
                    found.append(library.get_task(given, languages=self.languages))
                except KeyError as error:
                    near = re.search(r"Did you mean: '(.*)'", str(error.args[0]))  # of 1,500 tasks
                    advice = did_you_mean(given, [*benchmarks]) or (f" Did you mean {near[1]}?" if near else "")
                    raise InputError(f"`tasks` has {given}: mteb has no such task or benchmark.{advice}") from error
        return list({task.metadata.name: task for task in found}.values())

    def _load(self, task: Any) -> None:
        """Read the data set of a task, or those of the tasks that it consists of."""
        for part in getattr(task.metadata, "tasks", None) or [task]:
            metadata = part.metadata
            source = metadata.dataset["path"]
            if self.path is not None and not part.data_loaded:
                source = str(self._copy_of(metadata))
                part.metadata = metadata.model_copy(update={"dataset": {**metadata.dataset, "path": source}})
            advice = f"Set `path` to a folder with a copy in {metadata.name}/, or reach the Hub."
            with refuse_damaged(f"`tasks` has {metadata.name}: its data set {source}", "cannot be read", advice):
                part.load_data()
            part.metadata = metadata

    def _copy_of(self, metadata: Any) -> Path:
        """The folder with the copy of a data set: called after the task, or after the repository on the Hub."""
        repository = str(metadata.dataset["path"])
        names: list[str] = [metadata.name, repository, repository.rpartition("/")[2]]
        places = [locate(str(self.path)) / name for name in names]
        if found := next((place for place in places if place.is_dir()), None):
            return found.resolve()
        command = f"hf download {repository} --repo-type dataset --local-dir {self.path}/{metadata.name}"
        raise InputError(f"`path`={self.path} has no folder {' or '.join(dict.fromkeys(names))}. To copy it: {command}")


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Put the random states of Python, numpy and torch back: every task of mteb sets them."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
