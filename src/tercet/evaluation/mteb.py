"""Tasks and benchmarks of mteb (Muennighoff et al. 2023, arXiv:2210.07316), run by mteb itself on any encode function."""

import json
import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import numpy as np
import torch

from tercet.distributed.gather import rank
from tercet.errors import InputError, did_you_mean, refuse_damaged, require
from tercet.evaluation.inputs import Floats, join_parts
from tercet.evaluation.sts import spearman_parts
from tercet.paths import check_writable, locate
from tercet.types import EncodeFunction

SIMILARITIES = {"cosine_spearman": "cosine_scores", "spearman": "similarity_scores"}  # main score of STS -> what mteb keeps
RANKED = {"ndcg": "ndcg_cut", "map": "map_cut", "recall": "recall", "precision": "P", "hit_rate": "success"}  # in pytrec_eval
ROUNDED = 1e-5  # mteb rounds scores of retrieval to five digits


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
        require(find_spec("mteb"), "mteb is not installed: pip install 'tercet[mteb]'.")
        listed = self.tasks and not isinstance(self.tasks, str)
        require(listed, f"`tasks`={self.tasks}: a list of names is needed, as [STSBenchmark].")
        advice = "Give one with a copy of each task's data set, or leave it out."
        require(self.path is None or locate(self.path).is_dir(), f"`path`={self.path} is no folder. {advice}")
        require("/" in self.name.strip("/"), f"`name`={self.name}: mteb's names of models are <organization>/<model>.")
        if self.results:
            check_writable(Path(self.results), "results")

    def __call__(self, encode: EncodeFunction) -> dict[str, float]:
        """Run the tasks, and average them if there are several: ``mteb/mean/main_score``."""
        library = import_module("mteb")
        cache = library.ResultCache(self.results) if self.results is not None and rank() == 0 else None
        with _random_state_kept():
            tasks = self._tasks(library)
            scores = {_metric(task): float(found.get_score()) for task, found in self._run(encode, tasks, cache=cache)}
        mean = {"mteb/mean/main_score": float(np.mean(list(scores.values())))} if len(scores) > 1 else {}
        return {**scores, **mean}

    def examples(self, encode: EncodeFunction) -> dict[str, Floats]:
        """The values of each query, pair or text, ``(N,)``, of the tasks whose main score is a mean of such values.

        They follow from the predictions that mteb writes: of retrieval and reranking (nDCG, MAP, recall, precision and hit
        rate at k), of STS (Spearman) and of classification (accuracy, averaged over mteb's experiments). Those tasks run once
        more. A task of several splits or languages, whose score is their mean, has the values of all. A task is left out
        where the mean of these values is not its score, as where it scores in a way of its own.
        """
        values: dict[str, Floats] = {}
        with _random_state_kept(), TemporaryDirectory() as folder:
            everything = self._tasks(import_module("mteb"))
            tasks = [task for task in everything if _has_examples(task)]
            for task, found in self._run(encode, tasks, prediction_folder=folder):
                written = json.loads(Path(folder, task.prediction_file_name).read_bytes())
                splits = [(split, entry["hf_subset"]) for split, entries in found.scores.items() for entry in entries]
                parts = [_values(task, split, subset, written[subset][split]) for split, subset in splits]
                joined = join_parts(parts) if all(map(len, parts)) else np.zeros(0)
                if len(joined) and abs(joined.mean() - found.get_score()) <= ROUNDED:
                    values[_metric(task)] = joined
        whole = len(values) == len(everything) > 1
        return {**values, **({"mteb/mean/main_score": join_parts([*values.values()])} if whole else {})}

    def _run(self, encode: EncodeFunction, tasks: Sequence[Any], **options: Any) -> Iterator[tuple[Any, Any]]:
        """Evaluate on each task by mteb: the task, whose data stays loaded, and its result."""
        from tercet.models.interop import FunctionModel  # imports transformers

        model = FunctionModel(encode, self.name, self.revision)
        common = {"cache": None, "overwrite_strategy": "always", "show_progress_bar": False, **options}
        for task in tasks:
            self._load(task)
            (found,) = import_module("mteb").evaluate(model, task, **common).task_results
            yield task, found

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


def _metric(task: Any) -> str:
    return f"mteb/{task.metadata.name}/{task.metadata.main_score}"


def _has_examples(task: Any) -> bool:
    """Whether the main score of a task is one that ``_values`` knows, of a task that is not made of others."""
    kind, main = task.metadata.type, task.metadata.main_score
    known = {"STS": main in SIMILARITIES, "Classification": main == "accuracy"}.get(kind, _ranking(main) is not None)
    return known and not getattr(task.metadata, "tasks", None)


def _ranking(main: str) -> tuple[str, str] | None:
    """The name in pytrec_eval, and the k, of a score as ndcg_at_10."""
    found = re.fullmatch(rf"({'|'.join(RANKED)})_at_(\d+)", main)
    return (RANKED[found[1]], found[2]) if found else None


def _values(task: Any, split: str, subset: str, predictions: Any) -> Floats:
    """The values ``(N,)`` of a split of a task, from what mteb has written of it; none where that has another form."""
    main = task.metadata.main_score
    data = task.dataset[subset][split] if subset in task.dataset else task.dataset[split]
    if main in SIMILARITIES:
        return spearman_parts(np.array(predictions[SIMILARITIES[main]]), np.array(data["score"], np.float64))
    if main == "accuracy":
        label = np.array(data[task.label_column_name])
        guesses = [guess for guess in predictions if len(guess) == len(label)]
        right = np.array([np.equal(guess, label) for guess in guesses], np.float64)
        return right.mean(0) if len(guesses) == len(predictions) else np.zeros(0)  # folds of cross-validation
    measure, k = _ranking(main) or ("", "")
    if task.ignore_identical_ids:
        predictions = {q: {d: score for d, score in found.items() if d != q} for q, found in predictions.items()}
    scores = import_module("pytrec_eval").RelevanceEvaluator(data["relevant_docs"], {f"{measure}.{k}"}).evaluate(predictions)
    return np.array([scores[query][f"{measure}_{k}"] for query in sorted(scores)])


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
