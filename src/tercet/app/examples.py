"""Metrics by example of a test: their files, and whether two of them differ beyond the choice of examples."""

import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from tercet.app.record import is_main_process
from tercet.app.run_files import Metrics
from tercet.errors import InputError, refuse_damaged, require
from tercet.evaluation.inputs import Floats, item_hash
from tercet.evaluation.significance import holm, randomization_tests
from tercet.messages import warn_once
from tercet.paths import atomic_write

EXAMPLES = "examples.npz"  # test metrics by example: names as in metrics.json without their stage
TEST_SET = "test_set"  # in it: a hash of what was encoded, in its order, which two files of one test have in common
SMALLER = "smaller_is_better"  # and: as the evaluators declare
EXAMPLES_SIZE = 1 << 28  # bytes of values by example that are read, unpacked


class _HashedEncode:
    """An encode function that adds the hashes of what it is asked to encode to ``seen``; else it is as the one inside."""

    def __init__(self, encode: Any, seen: dict[bytes, None]) -> None:
        self.encode, self.seen = encode, seen

    def __call__(self, items: Sequence[Any]) -> Any:
        self.seen.update(dict.fromkeys(map(item_hash, items)))  # each once: a model with prompts may be asked more often
        return self.encode(items)

    def __getattr__(self, name: str) -> Any:
        own = getattr(self.encode, name)
        if name not in ("for_column", "for_task"):
            return own

        def chosen(*arguments: Any) -> Any:  # the encode function with a prompt, which adds its hashes, too
            found = own(*arguments)
            return self if found is self.encode else _HashedEncode(found, self.seen)

        return chosen


def write_examples(file: Path, evaluator: Any, encode: Any) -> bool:
    """Write the test's metrics by example, where the evaluator has some; ``compare`` asks what other examples would change.

    Returns whether there are some; else a file of an earlier test, which the new metrics are not of, is removed.
    """
    seen: dict[bytes, None] = {}
    examples = evaluator.examples(_HashedEncode(encode, seen)) if hasattr(evaluator, "examples") else {}
    values: Any = {name: np.asarray(x, np.float32) for name, x in examples.items()}
    if values and is_main_process():
        test = hashlib.blake2b(b"".join(seen), digest_size=16).digest()
        values |= {TEST_SET: np.frombuffer(test, np.uint8), SMALLER: np.array(sorted(_smaller(evaluator)), np.str_)}
        with atomic_write(file) as partial:
            np.savez_compressed(partial, **values)
    elif is_main_process():
        file.unlink(missing_ok=True)
    return bool(values)


def _smaller(evaluator: Any) -> set[str]:
    """What an evaluator, or the members of a group, declare as better when smaller."""
    members = getattr(evaluator, "members", {}).values()
    return set(getattr(evaluator, "smaller_is_better", ())).union(*map(_smaller, members))


def examples_beside(results: Path) -> Path:
    """The file with the values by example of the results of ``tercet evaluate``: results_examples.npz of results.json."""
    return results.with_name(f"{results.stem}_{EXAMPLES}")


@contextmanager
def open_examples(file: Path) -> Iterator[Any]:
    """Yield the arrays of a file of values by example, by name; ``InputError`` where it is damaged or too large."""
    with refuse_damaged(str(file)):
        try:
            with np.load(file) as content:  # which refuses pickles
                size = sum(info.file_size for info in content.zip.infolist())
                require(size <= EXAMPLES_SIZE, f"{file} has {size:,} bytes, unpacked; {EXAMPLES_SIZE:,} are accepted.")
                yield content
        except MemoryError as error:  # a header that promises more than there is
            raise ValueError(str(error)) from error


def read_examples(file: Path, metric: str) -> tuple[Floats, bytes]:
    """The values of a metric by example ``(N,)``, none where it has none, and the hash of the test, empty if not recorded.

    Raises ``InputError`` where the file, which may be a stranger's, is damaged, or a value is not finite.
    """
    with open_examples(file) as content:
        values = content[metric].astype(np.float64).reshape(-1) if metric in content else np.zeros(0)
        test = content[TEST_SET].tobytes() if TEST_SET in content else b""
    require(np.isfinite(values).all(), f"{file}: not all values of {metric} are finite. Write it anew.")
    return values, test


@functools.cache
def compare_examples(settings: tuple[tuple[Path, ...], ...], metric: str) -> dict[tuple[int, int], float]:
    """The p values of randomization over the test's examples for each two settings, by index, corrected for all (Holm).

    A setting is the files of its runs, over which values are averaged. Left out are pairs where a run has no values by
    example, or those of other examples.
    """
    read = [[_read_examples(file, metric) for file in files] for files in settings]
    means = [np.mean([x for x, _ in runs], axis=0) if _are_of_one_test(runs) else np.zeros(0) for runs in read]
    pairs = [(i, j) for i, j in combinations(range(len(means)), 2) if len(means[i]) and _are_of_one_test(read[i] + read[j])]
    found: dict[tuple[int, int], float] = {}
    for size in {len(means[i]) for i, _ in pairs}:
        same = [(i, j) for i, j in pairs if len(means[i]) == size]
        found |= dict(zip(same, randomization_tests(np.stack([means[i] - means[j] for i, j in same])), strict=True))
    return dict(zip(found, holm([*found.values()]), strict=True))


def _read_examples(path: Path, metric: str) -> tuple[Any, bytes]:
    """``read_examples``; no values where there is no such file, and with a warning where it is damaged."""
    try:
        return read_examples(path, metric) if path.is_file() else (np.zeros(0), b"")
    except InputError as error:
        warn_once(f"{error} Its values by example are left out.")
        return np.zeros(0), b""


def _are_of_one_test(runs: Sequence[tuple[Any, bytes]]) -> bool:
    """Whether values by example can be paired: as many, and of one test as far as that is recorded."""
    return len({len(values) for values, _ in runs}) == 1 and len({test for _, test in runs if test}) <= 1


def shared_metrics(results: Mapping[Path, Metrics]) -> list[str]:
    """The metrics, of the test, that all files of results of ``evaluate`` have with values by example."""
    found = []
    for path, metrics in results.items():
        with open_examples(examples_beside(path)) as content:
            found.append({f"test/{name}" for name in content} & metrics.keys())
    names = sorted(set.intersection(*found))
    require(names, "runs: no metric has values by example in all of them. Evaluate all models by the same `evaluation`.")
    return names


def check_examples(results: Mapping[Path, Metrics], metric: str) -> None:
    """Raise ``InputError`` unless all results have values of a metric for the same examples, whose means are the metric."""
    found = {path: read_examples(examples_beside(path), metric.removeprefix("test/")) for path in results}
    first, own = next(iter(found.items()))
    for path, (values, test) in found.items():
        mean, value = float(values.sum()) / max(1, len(values)), results[path][metric]
        stale = f"runs={path}: {metric} is {value:.6g}, but the mean of {examples_beside(path).name} is {mean:.6g}"
        require(abs(mean - value) <= 1e-4 * max(1.0, abs(value)), f"{stale}: they are not of one evaluation. Evaluate anew.")
        other = f"runs={path}: {metric} has {len(values)} test examples that are not the {len(own[0])} of {first}"
        advice = "Evaluate all models on the same data, by the same `evaluation`: values are compared example by example."
        require(_are_of_one_test([own, (values, test)]), f"{other}. {advice}")
