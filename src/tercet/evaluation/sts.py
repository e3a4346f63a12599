"""How well scores follow a gold standard."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import pearsonr, spearmanr
from torch import Tensor

from tercet.errors import InputError
from tercet.evaluation.alignment_uniformity import alignment, uniformity
from tercet.evaluation.task_data import ONE_SET, STS_SPLITS, STS_TASKS, ScoredPairs, read_sts
from tercet.types import EncodeFunction

if TYPE_CHECKING:
    from matplotlib.figure import Figure


Floats = npt.NDArray[np.float64]


def correlations(scores: Floats, gold: Floats, subset: npt.NDArray[np.str_] | None) -> dict[str, float]:
    """Spearman's and Pearson's correlation, each in the three ways that papers report (SimCSE, arXiv:2104.08821, B).

    ``_all`` is one correlation over all pairs, ``_mean`` the mean over subsets, ``_wmean`` that weighted by their
    sizes; without ``subset`` there is only ``_all``. Shapes ``(N,)``; ``gold`` must vary in each subset.
    """
    found = {}
    for name, measure in (("spearman", spearmanr), ("pearson", pearsonr)):
        found[f"{name}_all"] = _correlation(measure, scores, gold)
        if subset is not None:
            names, sizes = np.unique(subset, return_counts=True)
            parts = [_correlation(measure, scores[subset == s], gold[subset == s]) for s in names]
            found[f"{name}_mean"] = float(np.mean(parts))
            found[f"{name}_wmean"] = float(np.average(parts, weights=sizes))
    return found


def _correlation(measure: object, scores: Floats, gold: Floats) -> float:
    """0 for constant scores: a collapsed model ranks nothing, and a NaN would neither compare nor be valid JSON."""
    if np.ptp(scores) == 0:
        return 0.0
    assert callable(measure)
    return float(measure(scores, gold).statistic)


SIX = tuple(f"{kind}_{over}" for kind in ("spearman", "pearson") for over in ("all", "mean", "wmean"))
ROWS = {
    "Spearman all": "spearman_all",
    "Spearman mean": "spearman_mean",
    "Spearman wmean": "spearman_wmean",
    "Pearson all": "pearson_all",
}
CLOSE = 4  # pairs with a gold score above it are positives (SimCSE, section 2.3)


def task_key(task: str) -> str:
    """A task's name in metrics: ``STS-B`` is ``stsb``, ``SICK-R`` is ``sickr``."""
    return task.lower().replace("-", "")


@dataclass(frozen=True)
class STS:
    """Correlates cosines with gold scores, with no regressor and no sentence cut short.

    ``path`` is a table with the columns task, subset, split, sentence1, sentence2, score (parquet, csv, tsv, jsonl),
    or "hub": the public sets of mteb, which lack the subsets and so ``_mean`` and ``_wmean`` of the years. ``split`` is
    test, or dev for STS-B and SICK-R.

    ``sts/<task>/<spearman|pearson>_<all|mean|wmean>``; STS-B and SICK-R are one set, so that all three are equal, and
    are plain ``spearman`` and ``pearson`` too. ``sts/avg/...`` is the unweighted mean over tasks, if several are there,
    of every name that all of them have; the paper's average is of scores rounded to two decimals. A cosine that does
    not exist is 0; a model whose cosines are all equal correlates 0.
    ``sts/stsb/alignment`` is over pairs with a gold score above 4 (if any), ``uniformity`` over all STS-B sentences.
    """

    path: str
    tasks: Sequence[str]
    split: str

    def __post_init__(self) -> None:
        if self.split not in STS_SPLITS:
            raise InputError(f"evaluation.split={self.split}: use one of {', '.join(STS_SPLITS)}.")
        if isinstance(self.tasks, str) or not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise InputError(f"evaluation.tasks={self.tasks}: a list without repetitions, of {', '.join(STS_TASKS)}.")
        for task in self.tasks:
            if task not in STS_TASKS:
                near = difflib.get_close_matches(str(task).upper(), STS_TASKS, 1)
                hint = f" Did you mean {near[0]}?" if near else ""
                raise InputError(f"evaluation.tasks has {task}: there are {', '.join(STS_TASKS)}.{hint}")
            if self.split == "dev" and task not in ONE_SET:
                raise InputError(
                    f"evaluation.split=dev, but {task} has only a test split. "
                    f"Use evaluation.tasks=[{','.join(ONE_SET)}] or evaluation.split=test."
                )

    @cached_property
    def pairs(self) -> dict[str, ScoredPairs]:
        """By task, in the paper's order; read at the first use, once."""
        return read_sts(self.path, [task for task in STS_TASKS if task in self.tasks], self.split)

    @property
    def missing(self) -> tuple[str, ...]:
        """The tasks that were asked for and that the data lacks."""
        return tuple(task for task in self.tasks if task not in self.pairs)

    def __call__(self, encode: EncodeFunction) -> dict[str, float]:
        """All metrics, from one call of ``encode`` with each distinct sentence once."""
        texts = list(dict.fromkeys(text for p in self.pairs.values() for text in (*p.first, *p.second)))
        place, z = {text: i for i, text in enumerate(texts)}, encode(texts)
        metrics: dict[str, float] = {}
        found: dict[str, dict[str, float]] = {}
        for task, p in self.pairs.items():
            x, y = (z[[place[text] for text in side]].double() for side in (p.first, p.second))
            found[task] = correlations(_cosine(x, y).numpy(), p.gold, p.subset)
            whole = {kind: found[task][f"{kind}_all"] for kind in ("spearman", "pearson") if task in ONE_SET}
            metrics |= {f"sts/{task_key(task)}/{name}": value for name, value in (found[task] | whole).items()}
            if task == "STS-B":
                metrics |= _geometry(x, y, p, z[[place[text] for text in dict.fromkeys((*p.first, *p.second))]])
        if len(found) > 1:
            shared = [name for name in SIX if all(name in values for values in found.values())]
            metrics |= {f"sts/avg/{name}": float(np.mean([v[name] for v in found.values()])) for name in shared}
        return metrics

    def figures(self, encode: EncodeFunction) -> dict[str, "Figure"]:
        """``sts_gold``: the cosine of each pair over what people said, a panel a task."""
        from tercet.evaluation.figures import against_gold

        points = {}
        for task, p in self.pairs.items():
            x, y = (encode(list(side)).double() for side in (p.first, p.second))
            points[task] = (p.gold, _cosine(x, y).numpy())
        return {"sts_gold": against_gold(points)} if points else {}

    def table(self, metrics: Mapping[str, float]) -> str:
        """The paper's table, of metrics as they were returned."""
        return f"STS, {self.split} split, x100\n{sts_table(metrics, '')}"


def sts_table(metrics: Mapping[str, float], prefix: str) -> str:
    """SimCSE's table as plain text, times 100; ``prefix`` stands before ``sts/`` in the names, as ``test/``."""
    present = [task for task in STS_TASKS if f"{prefix}sts/{task_key(task)}/spearman_all" in metrics]
    columns = {task: task_key(task) for task in present} | ({"Avg.": "avg"} if len(present) > 1 else {})
    lines = [" " * 14 + "".join(f"{title:>8}" for title in columns)]
    for title, name in ROWS.items():
        values = [metrics.get(f"{prefix}sts/{column}/{name}") for column in columns.values()]
        if any(value is not None for value in values):
            cells = (f"{'-' if value is None else f'{100 * value:.2f}':>8}" for value in values)
            lines.append(f"{title:<14}{''.join(cells)}")
    if missing := [task for task in STS_TASKS if task not in present]:
        lines.append(f"Not measured: {', '.join(missing)}. The paper's average is over all {len(STS_TASKS)} tasks.")
    return "\n".join(lines)


def _cosine(x: Tensor, y: Tensor) -> Tensor:
    """``(N,)`` in float64; 0 where a row is zero or not finite.

    Rounded far below float32, so that equal cosines tie, as those of a sentence with itself, on every machine.
    """
    cosine = (x * y).sum(1) / (torch.linalg.vector_norm(x, dim=1) * torch.linalg.vector_norm(y, dim=1))
    return torch.nan_to_num(cosine, 0.0, 0.0, 0.0).round(decimals=12)


def _geometry(x: Tensor, y: Tensor, pairs: ScoredPairs, unique: Tensor) -> dict[str, float]:
    close = torch.from_numpy(pairs.gold > CLOSE)
    found = {"sts/stsb/alignment": alignment(x[close], y[close])} if close.any() else {}
    return found | {"sts/stsb/uniformity": uniformity(unique)}
