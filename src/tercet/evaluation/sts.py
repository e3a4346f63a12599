"""Semantic textual similarity: how well cosines follow the scores that people gave."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import pearsonr, spearmanr
from torch import Tensor

from tercet.errors import InputError
from tercet.evaluation.alignment_uniformity import alignment, uniformity
from tercet.evaluation.figures import plot_gold
from tercet.evaluation.inputs import encode_once
from tercet.evaluation.task_data import STS_SPLITS, STS_TASKS, UNDIVIDED, STSPairs, check_tasks, read_sts
from tercet.types import EncodeFunction

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Floats = npt.NDArray[np.float64]
CORRELATIONS = tuple(f"{kind}_{over}" for kind in ("spearman", "pearson") for over in ("all", "mean", "wmean"))
CLOSE = 4  # pairs with a gold score above it are positives (SimCSE, section 2.3)


def correlations(scores: Floats, gold: Floats, subset: npt.NDArray[np.str_] | None) -> dict[str, float]:
    """Spearman's and Pearson's correlation, each in the three ways that papers report (SimCSE, arXiv:2104.08821, B).

    ``_all`` is one correlation over all pairs, ``_mean`` the mean over subsets, ``_wmean`` that weighted by their sizes;
    without ``subset`` there is only ``_all``. Shapes ``(N,)``; ``gold`` must vary in each subset. By scipy: torchmetrics adds
    an epsilon to Spearman's denominator (1e-7 off at 3,750 pairs) and rounds Pearson's differently (3e-16).
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


def _correlation(measure: Callable[[Floats, Floats], Any], scores: Floats, gold: Floats) -> float:
    """0 for constant scores: a collapsed model ranks nothing, and a NaN would neither compare nor be valid JSON."""
    return 0.0 if np.ptp(scores) == 0 else float(measure(scores, gold).statistic)


def task_key(task: str) -> str:
    """A task's name in metrics: ``STS-B`` is ``stsb``, ``SICK-R`` is ``sickr``."""
    return task.lower().replace("-", "")


@dataclass(frozen=True)
class STS:
    r"""Correlates cosines with gold scores, without a regressor and without truncating sentences.

    ``path`` is a table with the columns task, subset, split, sentence1, sentence2, score (parquet, csv, tsv, jsonl), or "hub":
    the public sets of mteb, which lack the subsets and so ``_mean`` and ``_wmean`` of the years. ``split`` is test, or dev for
    STS-B and SICK-R.

    ``sts/<task>/<spearman|pearson>_<all|mean|wmean>``; STS-B and SICK-R are one set, so that all three are equal, also
    ``spearman`` and ``pearson``. ``sts/avg/...`` is the unweighted mean over tasks, if there are several, of every name that
    all of them have; the paper's average is of scores rounded to two decimals. A cosine that does not exist is 0; a model whose
    cosines are all equal correlates 0. ``sts/stsb/alignment`` is over pairs with a gold score above 4 (if any), ``uniformity``
    over all STS-B sentences.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "sts.csv")
    >>> rows = ["task,subset,split,sentence1,sentence2,score", "STS-B,,test,a,a,5", "STS-B,,test,a,ab,3", "STS-B,,test,a,b,0"]
    >>> _ = path.write_text("\n".join(rows))
    >>> metrics = STS(path, ["STS-B"])(lambda texts: np.array([[text.count("a"), text.count("b")] for text in texts]))
    >>> metrics["sts/stsb/spearman"]
    1.0
    """

    path: str | Path
    tasks: Sequence[str] = STS_TASKS
    split: str = "test"

    def __post_init__(self) -> None:
        if self.split not in STS_SPLITS:
            raise InputError(f"`split`={self.split}: use one of {', '.join(STS_SPLITS)}.")
        check_tasks(self.tasks, STS_TASKS)
        if self.split == "dev" and (others := [task for task in self.tasks if task not in UNDIVIDED]):
            tasks = ",".join(UNDIVIDED)
            raise InputError(f"`split`=dev, but {others[0]} has only a test split. Use `tasks`=[{tasks}] or `split`=test.")

    @cached_property
    def pairs(self) -> dict[str, STSPairs]:
        """By task, in the paper's order, read at first use."""
        return read_sts(self.path, [task for task in STS_TASKS if task in self.tasks], self.split)

    def __call__(self, encode: EncodeFunction) -> dict[str, float]:
        """Measure, with one call of ``encode`` with each distinct sentence once."""
        embed = encode_once(encode, [text for p in self.pairs.values() for text in (*p.first, *p.second)])
        metrics: dict[str, float] = {}
        found: dict[str, dict[str, float]] = {}
        for task, p in self.pairs.items():
            x, y = embed(p.first).double(), embed(p.second).double()
            found[task] = correlations(_cosine(x, y).numpy(), p.gold, p.subset)
            plain = {kind: found[task][f"{kind}_all"] for kind in ("spearman", "pearson") if task in UNDIVIDED}
            metrics |= {f"sts/{task_key(task)}/{name}": value for name, value in (found[task] | plain).items()}
            if task == "STS-B":
                close = torch.from_numpy(p.gold > CLOSE)
                metrics |= {"sts/stsb/alignment": alignment(x[close], y[close])} if close.any() else {}
                metrics["sts/stsb/uniformity"] = uniformity(embed(list(dict.fromkeys((*p.first, *p.second)))))
        if len(found) > 1:
            shared = [name for name in CORRELATIONS if all(name in values for values in found.values())]
            metrics |= {f"sts/avg/{name}": float(np.mean([v[name] for v in found.values()])) for name in shared}
        return metrics

    def figures(self, encode: EncodeFunction) -> "dict[str, Figure]":
        """Draw ``sts_gold``: the cosine of each pair over its gold score, a panel for each task."""
        points = {}
        for task, p in self.pairs.items():
            embed = encode_once(encode, [*p.first, *p.second])
            points[task] = (p.gold, _cosine(embed(p.first).double(), embed(p.second).double()).numpy())
        return {"sts_gold": plot_gold(points)} if points else {}

    def table(self, metrics: Mapping[str, float]) -> str:
        """Format the paper's table, of metrics named as they were returned."""
        return f"STS, {self.split} split, x100\n{sts_table(metrics)}"


def sts_table(metrics: Mapping[str, float], prefix: str = "") -> str:
    """Format SimCSE's table as plain text, times 100; ``prefix``, as ``test/``, is before ``sts/`` in the names of metrics.

    >>> print(sts_table({f"sts/{task_key(task)}/spearman_all": 0.76254 for task in (*STS_TASKS, "avg")}))
                     STS12   STS13   STS14   STS15   STS16   STS-B  SICK-R    Avg.
    Spearman all     76.25   76.25   76.25   76.25   76.25   76.25   76.25   76.25
    """
    present = [task for task in STS_TASKS if f"{prefix}sts/{task_key(task)}/spearman_all" in metrics]
    columns = {task: task_key(task) for task in present} | ({"Avg.": "avg"} if len(present) > 1 else {})
    lines = [" " * 14 + "".join(f"{title:>8}" for title in columns)]
    for name in CORRELATIONS[:4]:  # those that the paper reports
        values = [metrics.get(f"{prefix}sts/{column}/{name}") for column in columns.values()]
        if any(value is not None for value in values):
            cells = (f"{'-' if value is None else f'{100 * value:.2f}':>8}" for value in values)
            lines.append(f"{name.replace('_', ' ').capitalize():<14}{''.join(cells)}")
    if missing := [task for task in STS_TASKS if task not in present]:
        lines.append(f"Not measured: {', '.join(missing)}. The paper's average is over all {len(STS_TASKS)} tasks.")
    return "\n".join(lines)


def _cosine(x: Tensor, y: Tensor) -> Tensor:
    """``(N,)`` in float64; 0 where a row is zero or not finite.

    Rounded far below float32, so that equal cosines tie, as those of a sentence with itself, on every machine.
    """
    cosine = (x * y).sum(1) / (torch.linalg.vector_norm(x, dim=1) * torch.linalg.vector_norm(y, dim=1))
    return torch.nan_to_num(cosine, 0.0, 0.0, 0.0).round(decimals=12)
