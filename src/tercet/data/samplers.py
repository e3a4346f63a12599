"""Batch samplers: random rows, P labels with K rows each, windows of consecutive sentences."""

from collections.abc import Callable, Iterator, Sized
from itertools import islice, repeat
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Sampler

from tercet.distributed.gather import rank, world_size
from tercet.errors import InputError
from tercet.messages import warn_once
from tercet.types import BatchDataset, BatchIndices


def rank_slice(size: int) -> slice:
    """This process's part of a global batch of ``size`` rows; the sizes of the parts differ by at most one."""
    return slice(size * rank() // world_size(), size * (rank() + 1) // world_size())


def combine_seeds(*parts: int) -> int:
    """Combine several seeds in one, so that an epoch of one run is not that of a run with the next seed."""
    number = 0
    for part in parts:
        number = (number * 1_000_003 + part) % (1 << 63)
    return number


class SeededBatchSampler(Sampler[BatchIndices]):
    """The base of samplers whose epochs are a function of (``seed``, epoch), the same for any number of processes.

    ``needs`` is what the source must provide ("label", "position", "all_rows"); ``provides`` is what a batch then has:
    "same_label" (several rows of one label) or "adjacent" (neighboring sentences).
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    provides: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, batch_size: int, seed: int) -> None:
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration draws; Lightning calls this."""
        self.epoch = epoch

    def _share(self, rows: Any, number: int) -> BatchIndices:
        """This process's rows of the epoch's global batch ``number``."""
        return BatchIndices(rows[rank_slice(len(rows))].tolist(), combine_seeds(self.seed, self.epoch, number))


class RandomBatchSampler(SeededBatchSampler):
    """Batches of ``batch_size`` rows in random order, each row once an epoch.

    The rows of the whole batch are the same for any number of processes. The last rows, which do not fill a batch, are left
    out, so that every batch has the same number of negatives; each epoch leaves out other rows.

    >>> [batch.rows for batch in RandomBatchSampler(range(5), batch_size=2, seed=0)]
    [[4, 0], [1, 3]]
    """

    def __init__(self, dataset: Sized, batch_size: int, seed: int) -> None:
        super().__init__(batch_size, seed)
        self.size = len(dataset)

    def __len__(self) -> int:
        return self.size // self.batch_size

    def __iter__(self) -> Iterator[BatchIndices]:
        generator = torch.Generator().manual_seed(combine_seeds(self.seed, self.epoch))
        order = torch.randperm(self.size, generator=generator)
        for number in range(len(self)):
            yield self._share(order[number * self.batch_size : (number + 1) * self.batch_size], number)


class ResumableSampler(Sampler[BatchIndices]):
    """The rest of an epoch of ``sampler``, for a run that is resumed in its middle after ``done()`` batches."""

    def __init__(self, sampler: Sampler[BatchIndices], done: Callable[[], int]) -> None:
        self.sampler = sampler
        self.done = done

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration draws; Lightning calls this."""
        self.sampler.set_epoch(epoch)  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[BatchIndices]:
        yield from islice(self.sampler, self.done() % len(self), None)


Ints = npt.NDArray[np.int64]


class PKBatchSampler(SeededBatchSampler):
    """Batches of labels with ``per_label`` K rows each, and ``distractors``: rows that are used only as negatives.

    FaceNet's batch (arXiv:1503.03832, section 3.2) has 1,800 rows, 40 of each label. Labels come in shuffled passes over all
    of them. A label gives K rows that it has not given before, as long as it has any; one with fewer than K rows gives those
    that it has and leaves room for more labels, so that a batch is always full. Distractors are rows whose label occurs once
    or that have none; then rows of labels that are not in the batch; where those are too few, rows of labels that are. No row
    is in a batch twice.

    Each batch is drawn from (``seed``, epoch) for all processes together and sliced by process. An epoch has as many batches
    as the rows fill. Set ``neighbors`` (label to its confusable labels, nearest first) to make such labels follow each other
    in a pass, so that they share batches.

    >>> from types import SimpleNamespace
    >>> dataset = SimpleNamespace(label=torch.tensor([0, 0, 1, 1, 2, 2]))
    >>> [sorted(dataset.label[batch.rows].tolist()) for batch in PKBatchSampler(dataset, 4, seed=0, per_label=2)]
    [[1, 1, 2, 2]]
    """

    needs: ClassVar[frozenset[str]] = frozenset({"label", "all_rows"})
    provides: ClassVar[frozenset[str]] = frozenset({"same_label"})

    def __init__(self, dataset: BatchDataset, batch_size: int, seed: int, per_label: int = 40, distractors: int = 0) -> None:
        super().__init__(batch_size, seed)
        values = dataset.label.numpy()
        names, index, sizes = np.unique(values, return_inverse=True, return_counts=True)
        paired = (sizes >= 2) & (names >= 0)
        self.per_label, self.distractors = per_label, distractors
        self.size = len(values)
        order = np.argsort(index, kind="stable")
        groups = np.split(order, np.cumsum(sizes)[:-1])
        self.rows_by_label: dict[int, Ints] = {
            int(name): group for name, group, two in zip(names, groups, paired, strict=True) if two
        }
        self.unpaired_rows: Ints = np.flatnonzero(~paired[index])
        self.values = values
        self.neighbors: dict[int, list[int]] = {}
        self._check()

    def _check(self) -> None:
        if self.per_label < 2:
            raise InputError(f"`per_label`={self.per_label}: 2 or more, so that a row has a positive.")
        if not 0 <= self.distractors <= self.batch_size - 2:
            raise InputError(f"`distractors`={self.distractors}: from 0 to `batch_size` - 2 = {self.batch_size - 2}.")
        wrong = ""
        if (self.values < 0).all():
            wrong = ": the training rows have no labels"
        elif not self.rows_by_label:
            wrong = " needs labels that occur twice or more, but every one of the training rows has a label of its own, or none"
        elif len(self.rows_by_label) == 1 and len(self.unpaired_rows) == 0:
            wrong = ": all training rows have the same label, so that there are no negatives"
        if wrong:
            advice = "or use RandomBatchSampler with an objective that needs no labels"
            raise InputError(f"PKBatchSampler{wrong}. Name the column of labels in the source's label, {advice}.")
        room = self.batch_size - self.distractors
        most = sum(min(self.per_label, len(rows)) for rows in self.rows_by_label.values())
        if most < room:
            others = f", and {self.distractors} are distractors" if self.distractors else ""
            raise InputError(
                f"`batch_size`={self.batch_size}: {len(self.rows_by_label)} labels with {self.per_label} rows at most give "
                f"{most} rows{others}. Use `batch_size`={most + self.distractors}, or a larger `per_label` "
                f"(now {self.per_label})."
            )
        if (largest := max(map(len, self.rows_by_label.values()))) < self.per_label:
            warn_once(f"per_label={self.per_label}: the largest label has {largest} rows; all give what they have.")

    def __len__(self) -> int:
        return max(1, self.size // self.batch_size)

    def __iter__(self) -> Iterator[BatchIndices]:
        for number, rows in zip(range(len(self)), self.batches(), strict=False):
            yield self._share(rows, number)

    def batches(self) -> Iterator[Ints]:
        """The epoch's global batches, ``(batch_size,)`` row numbers each, without end."""
        rng = np.random.default_rng([self.seed, self.epoch])
        queues = {label: _Queue(rows, rng) for label, rows in self.rows_by_label.items()}
        rest = _Queue(self.unpaired_rows, rng) if len(self.unpaired_rows) else None
        passes, waiting = self._labels(rng), list[int]()
        while True:
            room, taken, used, late = self.batch_size - self.distractors, list[Ints](), set[int](), list[int]()
            while room >= 2:
                label = waiting.pop(0) if waiting else next(passes)
                if label in used:
                    late.append(label)  # a new pass began in this batch; the label comes first in the next one
                    continue
                used.add(label)
                taken.append(queues[label].take(min(self.per_label, room, len(self.rows_by_label[label]))))
                room -= len(taken[-1])
            waiting = late + waiting
            extra = self.distractors + room
            if extra:
                taken.append(self._distractors(extra, rest, np.concatenate(taken), rng))
            yield rng.permutation(np.concatenate(taken))

    def _distractors(self, count: int, rest: "_Queue | None", taken: Ints, rng: np.random.Generator) -> Ints:
        single = rest.take(min(count, rest.size)) if rest else np.zeros(0, dtype=np.int64)
        if len(single) == count:
            return single
        left = np.setdiff1d(np.arange(self.size), np.concatenate([single, taken]))
        same = np.isin(self.values[left], self.values[taken])
        more = np.concatenate([rng.permutation(left[~same]), rng.permutation(left[same])])
        return np.concatenate([single, more[: count - len(single)]])

    def _labels(self, rng: np.random.Generator) -> Iterator[int]:
        labels = np.array(list(self.rows_by_label))
        for _ in repeat(None):
            order = rng.permutation(labels).tolist()
            yield from _group_neighbors(order, self.neighbors) if self.neighbors else order


def _group_neighbors(order: list[int], neighbors: dict[int, list[int]]) -> Iterator[int]:
    """The labels in their order, but each followed by those of its neighbors that have not come yet."""
    left = dict.fromkeys(order)
    while left:
        label = next(iter(left))
        for name in (label, *neighbors.get(label, [])):
            if name in left:
                del left[name]
                yield name


class _Queue:
    """Rows in one random order after another; what is taken at once never holds a row twice."""

    def __init__(self, rows: Ints, rng: np.random.Generator) -> None:
        self.rows, self.rng = rows, rng
        self.order: Ints = rng.permutation(rows)
        self.size = len(rows)

    def take(self, count: int) -> Ints:
        taken, self.order = self.order[:count], self.order[count:]
        if len(taken) < count:
            order = self.rng.permutation(self.rows)
            more = order[~np.isin(order, taken)][: count - len(taken)]
            self.order = order[~np.isin(order, more)]
            taken = np.concatenate([taken, more])
        return taken


class WindowBatchSampler(SeededBatchSampler):
    """Batches of k windows of ``window`` m consecutive sentences of a document: k · m = ``batch_size``.

    The document is a row's ``label``, its place in it ``position``; rows may be stored in any order. k = 1, m = 400 is the
    batch of Logeswaran and Lee 2018 (arXiv:1803.02893), which never crosses documents here; with several shorter windows the
    other keys are less alike.

    Each epoch starts at another sentence of each document, so that its windows and the sentences that do not fill one differ,
    and shuffles the windows of all documents. Each batch is drawn from (``seed``, epoch) for all processes together and sliced
    by process. Left out and counted in a warning are documents that are shorter than a window, rows without a document or a
    position, and rows whose position another row of the document has.

    >>> from types import SimpleNamespace
    >>> dataset = SimpleNamespace(label=torch.zeros(6, dtype=torch.long), position=torch.arange(6))
    >>> [batch.rows for batch in WindowBatchSampler(dataset, 3, seed=0, window=3)]
    [[0, 1, 2], [3, 4, 5]]
    """

    needs: ClassVar[frozenset[str]] = frozenset({"label", "position", "all_rows"})
    provides: ClassVar[frozenset[str]] = frozenset({"adjacent"})

    def __init__(self, dataset: BatchDataset, batch_size: int, seed: int, window: int = 400) -> None:
        super().__init__(batch_size, seed)
        self.window = window
        self._check()
        label, position = dataset.label.numpy(), dataset.position.numpy()
        if (label < 0).all() or (position < 0).all():
            missing = "position (the sentence's number in its document)" if (label >= 0).any() else "label (the document)"
            raise InputError(
                f"WindowBatchSampler needs sentences in order, but the training rows have no {missing}. Name the columns in "
                "the source's label and position, or use a source of books."
            )
        self.documents = self._documents(label, position)
        if len(self) == 0:
            count = sum(self._count(len(rows)) for rows in self.documents)
            raise InputError(
                f"`batch_size`={batch_size} is {batch_size // window} windows of {window} sentences, but the training "
                f"documents hold {count}. Use `batch_size`={count * window} at most, or a smaller `window`."
            )

    def _check(self) -> None:
        m, size = self.window, self.batch_size
        if m < 2:
            raise InputError(f"`window`={m}: 2 sentences or more, so that one has a neighbor.")
        if size % m:
            near = " or ".join(str(n) for n in (size // m * m, (size // m + 1) * m) if n)
            raise InputError(
                f"`batch_size`={size} is no multiple of `window`={m}. Use `batch_size`={near}, or a `window` that divides it."
            )

    def _documents(self, label: Ints, position: Ints) -> list[Ints]:
        """The rows of each document that holds a window, in order."""
        order = np.lexsort((position, label))
        order = order[(label[order] >= 0) & (position[order] >= 0)]
        if missing := len(label) - len(order):
            warn_once(f"Windows: {missing} of {len(label)} rows have no document or no position; they are left out.")
        again = (np.diff(label[order], prepend=-1) == 0) & (np.diff(position[order], prepend=-1) == 0)
        if again.any():
            row = int(order[again][0])
            warn_once(
                f"Windows: {int(again.sum())} of {len(label)} rows have the position of another row of their document (the "
                f"first: position {position[row]}); they are left out."
            )
        elif (np.diff(order)[np.diff(label[order]) == 0] < 0).any():
            warn_once("Windows: the rows are not stored in order; they are read by document and position.")
        order = order[~again]
        documents = np.split(order, np.flatnonzero(np.diff(label[order])) + 1)
        long = [rows for rows in documents if len(rows) >= self.window]
        if not long:
            longest = max(map(len, documents))
            smaller = f"Use `window`={longest} at most, or longer documents." if longest > 1 else "None has neighbors."
            raise InputError(
                f"`window`={self.window}, but the longest of {len(documents)} documents has {longest} sentences with a "
                f"document and a position. {smaller}"
            )
        if short := len(documents) - len(long):
            left = len(order) - sum(map(len, long))
            warn_once(
                f"Windows: {short} of {len(documents)} documents ({left} sentences) are shorter than a window of "
                f"{self.window}; they are left out."
            )
        return long

    def __len__(self) -> int:
        return sum(self._count(len(rows)) for rows in self.documents) * self.window // self.batch_size

    def __iter__(self) -> Iterator[BatchIndices]:
        k, windows = self.batch_size // self.window, self.windows()
        for number in range(len(self)):
            yield self._share(np.concatenate(windows[number * k : (number + 1) * k]), number)

    def windows(self) -> list[Ints]:
        """The epoch's windows, ``(window,)`` row numbers each, shuffled."""
        rng, m = np.random.default_rng([self.seed, self.epoch]), self.window
        cut = []
        for rows in self.documents:
            count = self._count(len(rows))
            start = int(rng.integers(len(rows) - count * m + 1))
            cut += list(rows[start : start + count * m].reshape(count, m))
        return [cut[i] for i in rng.permutation(len(cut))]

    def _count(self, sentences: int) -> int:
        return sentences // self.window
