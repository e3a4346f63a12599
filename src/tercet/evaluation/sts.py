"""Semantic textual similarity: how well cosines follow the scores that people gave."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.stats import pearsonr, rankdata, spearmanr, zscore
from torch import Tensor

from tercet.errors import InputError, check_choice, require
from tercet.evaluation.alignment_uniformity import alignment, uniformity
from tercet.evaluation.inputs import Floats, Strings, check_tasks, clean_sentence, encode_once, join_parts, read_tasks
from tercet.evaluation.senteval import COUNTS, SentEval
from tercet.messages import warn_once
from tercet.paths import locate
from tercet.types import EncodeFunction

STS_COLUMNS = ("task", "subset", "split", "sentence1", "sentence2", "score")
# mteb's copies: raw text where SentEval's is tokenized and in lower case, all 9,927 pairs of SICK-R, no subsets.
HUB = {f"STS{year}": f"mteb/sts{year}-sts" for year in range(12, 17)}
HUB |= {"STS-B": "mteb/stsbenchmark-sts", "SICK-R": "mteb/sickr-sts"}
STS_TASKS = tuple(HUB)
TASK_KEYS = {task: task.lower().replace("-", "") for task in (*STS_TASKS, "avg")}  # their names in metrics
UNDIVIDED = ("STS-B", "SICK-R")  # scored as a whole, whatever subsets the data names
STS_SPLITS = {"test": ("test",), "dev": ("dev", "trial", "validation")}  # SICK's dev split is "trial", the hub's "validation"
CORRELATIONS = tuple(f"{kind}_{over}" for kind in ("spearman", "pearson") for over in ("all", "mean", "wmean"))


@dataclass(frozen=True)
class STSPairs:
    """N pairs of a task: ``gold (N,)`` and ``subset (N,)``, which is None where the data does not name subsets."""

    first: Sequence[str]
    second: Sequence[str]
    gold: Floats
    subset: Strings | None


def correlations(scores: Floats, gold: Floats, subset: Strings | None) -> dict[str, float]:
    """Spearman's and Pearson's correlation, each in the three ways that papers report (SimCSE, arXiv:2104.08821, B).

    ``_all`` is one correlation over all pairs, ``_mean`` the mean over subsets, ``_wmean`` that weighted by their sizes;
    without ``subset`` there is only ``_all``. Shapes ``(N,)``; ``gold`` must vary in each subset.
    """

    def correlate(measure: Any, which: Any) -> float:  # 0 for constant scores: a collapsed model ranks nothing
        return 0.0 if np.ptp(scores[which]) == 0 else float(measure(scores[which], gold[which]).statistic)

    found = {}
    for name, measure in (("spearman", spearmanr), ("pearson", pearsonr)):  # torchmetrics' Spearman is 1e-7 off
        found[f"{name}_all"] = correlate(measure, slice(None))
        if subset is not None:
            names, sizes = np.unique(subset, return_counts=True)
            parts = [correlate(measure, subset == s) for s in names]
            found[f"{name}_mean"] = float(np.mean(parts))
            found[f"{name}_wmean"] = float(np.average(parts, weights=sizes))
    return found


def spearman_parts(scores: Floats, gold: Floats) -> Floats:
    """Each pair's part in Spearman's correlation, whose mean it is: the product of its standardized ranks, ``(N,)``."""
    varies = np.ptp(scores) > 0  # else 0, as in ``correlations``
    return np.asarray(zscore(rankdata(scores)) * zscore(rankdata(gold)) if varies else np.zeros(len(scores)))


@dataclass(frozen=True)
class STS:
    r"""Correlates cosines with gold scores, without a regressor and without truncating sentences.

    ``path`` is SentEval's folder data/downstream, which has the pairs of published tables; a table with the columns task,
    subset, split, sentence1, sentence2, score (parquet, csv, tsv, jsonl); or "hub": mteb's public sets, of other text and
    partly other pairs, so that their metrics have other names, ``sts/<task>_hub/...``. ``tasks`` are the sets that are
    measured. ``split`` is test, or dev.

    ``sts/<task>/<spearman|pearson>_<all|mean|wmean>``; of STS-B and SICK-R, which are one set each, ``spearman`` and
    ``pearson``. ``sts/avg/<...>_<all|mean|wmean>`` is the unweighted mean over several tasks, where those two count for all
    three ways, and the hub has ``_all`` only; the paper's average is of scores rounded to two decimals. A cosine that does not
    exist is 0; equal cosines correlate 0. ``sts/stsb/alignment`` is over pairs with a gold score above 4 (if any),
    ``uniformity`` over all STS-B sentences.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "sts.csv")
    >>> rows = ["task,subset,split,sentence1,sentence2,score", "STS-B,,test,a,a,5", "STS-B,,test,a,ab,3", "STS-B,,test,a,b,0"]
    >>> _ = path.write_text("\n".join(rows))
    >>> STS(path, ["STS-B"])(lambda texts: np.array([[x.count("a"), x.count("b")] for x in texts]))["sts/stsb/spearman"]
    1.0
    """

    path: str | Path
    tasks: Sequence[str] = STS_TASKS
    split: str = "test"
    smaller_is_better: ClassVar[frozenset[str]] = frozenset({"alignment", "uniformity"})

    def __post_init__(self) -> None:
        check_choice("split", self.split, tuple(STS_SPLITS))
        check_tasks(self.tasks, STS_TASKS)
        if self.split == "dev" and (others := [task for task in self.tasks if task not in UNDIVIDED]):
            advice = f"Use `tasks`=[{','.join(UNDIVIDED)}] or `split`=test."
            raise InputError(f"`split`=dev, but {others[0]} has only a test split. {advice}")

    @cached_property
    def pairs(self) -> dict[str, STSPairs]:
        """By task, in the paper's order, read at first use; without pairs that have no gold score, as in SentEval."""
        tasks = [task for task in STS_TASKS if task in self.tasks]
        if self.path == "hub":
            rows = {task: _load_hub(task, self.split) for task in tasks}
        elif (folder := locate(str(self.path))).is_dir():
            senteval = SentEval(folder, self.path)
            rows = {task: senteval.sts(task, self.split) for task in tasks}
        else:
            rows = read_tasks(self.path, STS_COLUMNS, tasks, STS_SPLITS[self.split])
        pairs = {task: _sts_pairs(self.path, task, some) for task, some in rows.items()}
        counts = {task: (len(p.gold), COUNTS[task][self.split]) for task, p in pairs.items()}
        if other := ", ".join(f"{task} {count:,} for {known:,}" for task, (count, known) in counts.items() if count != known):
            warn_once(f"{self.path}: other numbers of pairs than SentEval's ({other}): not comparable with published results.")
        return pairs

    def __call__(self, encode: EncodeFunction) -> dict[str, float]:
        """Measure, with one call of ``encode``."""
        embed = encode_once(encode, [text for p in self.pairs.values() for text in (*p.first, *p.second)])
        metrics: dict[str, float] = {}
        found = []
        for task, p in self.pairs.items():
            x, y = embed(p.first).double(), embed(p.second).double()
            found.append(values := correlations(_cosine(x, y).numpy(), p.gold, p.subset))
            if task in UNDIVIDED:
                values = {kind: values[f"{kind}_all"] for kind in ("spearman", "pearson")}
            metrics |= {f"{self._prefix(task)}/{name}": value for name, value in values.items()}
            if task == "STS-B":
                close = torch.from_numpy(p.gold > 4)  # the positives of SimCSE, section 3, footnote 3
                metrics |= {f"{self._prefix(task)}/alignment": alignment(x[close], y[close])} if close.any() else {}
                metrics[f"{self._prefix(task)}/uniformity"] = uniformity(embed(list(dict.fromkeys((*p.first, *p.second)))))
        if len(found) > 1:
            shared = [name for name in CORRELATIONS if all(name in values for values in found)]
            metrics |= {f"{self._prefix('avg')}/{name}": float(np.mean([values[name] for values in found])) for name in shared}
        return metrics

    def examples(self, encode: EncodeFunction) -> dict[str, Floats]:
        """Each pair's part in Spearman's correlation, ``(N,)``: the product of its standardized ranks, whose mean it is."""
        embed = encode_once(encode, [text for p in self.pairs.values() for text in (*p.first, *p.second)])
        parts = {}
        for task, p in self.pairs.items():
            parts[task] = spearman_parts(_cosine(embed(p.first).double(), embed(p.second).double()).numpy(), p.gold)
        values = {f"{self._prefix(task)}/spearman{'' if task in UNDIVIDED else '_all'}": part for task, part in parts.items()}
        if len(parts) > 1:
            values[f"{self._prefix('avg')}/spearman_all"] = join_parts(list(parts.values()))
        return values

    def _prefix(self, task: str) -> str:
        return f"sts/{TASK_KEYS[task]}{'_hub' if self.path == 'hub' else ''}"

    def figures(self, encode: EncodeFunction) -> dict[str, Any]:
        """Draw ``sts_gold``: the cosine of each pair over its gold score, a panel for each task."""
        from tercet.evaluation.figures import plot_gold  # needs matplotlib

        embed = encode_once(encode, [text for p in self.pairs.values() for text in (*p.first, *p.second)])
        sides = {task: (embed(p.first).double(), embed(p.second).double()) for task, p in self.pairs.items()}
        return {"sts_gold": plot_gold({task: (p.gold, _cosine(*sides[task]).numpy()) for task, p in self.pairs.items()})}

    def table(self, metrics: Mapping[str, float]) -> str:
        """Format the paper's table, of metrics named as they were returned."""
        if self.path == "hub":
            table = sts_table({name.replace("_hub/", "/"): value for name, value in metrics.items()})
            return f"STS, {self.split} split, x100, of the hub's sets: not the pairs of published tables\n{table}"
        return f"STS, {self.split} split, x100\n{sts_table(metrics)}"


def sts_table(metrics: Mapping[str, float], prefix: str = "") -> str:
    """Format SimCSE's table as plain text, times 100; ``prefix``, as ``test/``, is before ``sts/`` in the names of metrics.

    >>> print(sts_table({"sts/sts12/spearman_all": 0.76254, "sts/stsb/spearman": 0.5, "sts/avg/spearman_all": 0.63127}))
                     STS12   STS-B    Avg.
    Spearman all     76.25   50.00   63.13
    Not measured: STS13, STS14, STS15, STS16, SICK-R. The paper's average is over all 7 tasks.
    """

    def value(key: str, name: str) -> float | None:  # of a set without subsets there is one of each kind
        plain, _, over = name.partition("_")
        names = (f"{prefix}sts/{key}/{name}" for name in (plain, f"{plain}_{over or 'all'}"))
        return next((metrics[name] for name in names if name in metrics), None)

    present = [task for task in STS_TASKS if value(TASK_KEYS[task], "spearman") is not None]
    columns = {task: TASK_KEYS[task] for task in present} | ({"Avg.": "avg"} if len(present) > 1 else {})
    lines = [" " * 14 + "".join(f"{title:>8}" for title in columns)]
    reported: Sequence[str] = ("spearman", "pearson")
    if not set(present) <= set(UNDIVIDED):  # those that the paper reports, as far as there are some
        keys = [f"{prefix}sts/{key}" for key in columns.values()]
        reported = [name for name in CORRELATIONS[:4] if any(f"{key}/{name}" in metrics for key in keys)]
    for name in reported:
        cells = ["-" if (x := value(key, name)) is None else f"{100 * x:.2f}" for key in columns.values()]
        lines.append(f"{name.replace('_', ' ').capitalize():<14}" + "".join(f"{cell:>8}" for cell in cells))
    if missing := [task for task in STS_TASKS if task not in present]:
        lines.append(f"Not measured: {', '.join(missing)}. The paper's average is over all {len(STS_TASKS)} tasks.")
    return "\n".join(lines)


def _cosine(x: Tensor, y: Tensor) -> Tensor:
    """``(N,)`` in float64; 0 where a row is zero or not finite."""
    cosine = (x * y).sum(1) / (torch.linalg.vector_norm(x, dim=1) * torch.linalg.vector_norm(y, dim=1))
    return torch.nan_to_num(cosine, 0.0, 0.0, 0.0).round(decimals=12)  # so that equal cosines tie on every machine


def _load_hub(task: str, split: str) -> list[dict[str, Any]]:
    import datasets

    name, part = HUB[task], "validation" if split == "dev" else split
    try:
        rows = datasets.load_dataset(name, split=part).select_columns(["sentence1", "sentence2", "score"])
    except Exception as error:  # the libraries below raise dozens of kinds
        fault = f"{name}, split {part}, cannot be loaded ({' '.join(str(error).split())})"
        advice = f"Set `path` to SentEval's folder or a table ({', '.join(STS_COLUMNS)}), or leave {task} out of `tasks`."
        raise InputError(f"`path`=hub: {fault}. {advice}") from error
    return [dict(row, where=f"`path`=hub ({name}), row {number}") for number, row in enumerate(rows, start=1)]


def _sts_pairs(path: str | Path, task: str, rows: Sequence[Mapping[str, Any]]) -> STSPairs:
    """Check and convert the rows of a task."""
    divided = task not in UNDIVIDED and "subset" in rows[0]
    kept: list[list[Any]] = []
    for row in rows:
        where, part = row["where"], row["subset"] if divided else task
        score = _gold_score(row["score"], where)
        if not math.isnan(score):
            require(part, f"{where}: the subset is empty. {task} is scored by subset: correct the row.")
            sides = [clean_sentence(row[side], side, where) for side in ("sentence1", "sentence2")]
            kept.append([*sides, score, str(part)])
    if dropped := len(rows) - len(kept):
        warn_once(f"{path}: {dropped} of {len(rows)} pairs of {task} have no gold score and are left out.")
    first, second, gold, subset = ([row[i] for row in kept] for i in range(4))
    scores, subsets = np.array(gold, np.float64), np.array(subset, dtype=np.str_)
    for name in sorted(set(subset)) or [""]:
        if len(set(scores[subsets == name])) < 2:  # there is no correlation with a constant
            where = f"`path`={path}, {task}{f', subset {name}' if divided and name else ''}"
            raise InputError(f"{where}: fewer than two different gold scores. Correct them, or leave the task out of `tasks`.")
    return STSPairs(first, second, scores, subsets if divided or task in UNDIVIDED else None)


def _gold_score(score: Any, where: str) -> float:
    """NaN where there is none."""
    try:
        value = math.nan if score is None or not str(score).strip() else float(score)
    except (TypeError, ValueError, OverflowError):
        value = math.inf
    require(not math.isinf(value), f"{where}: the score is {score!r}. A finite number is needed, or none to leave the row out.")
    return value
