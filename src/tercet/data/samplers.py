"""Batch samplers: random rows, rows that share no text, P labels with K rows each, windows of consecutive sentences."""

from collections.abc import Callable, Iterator, Sized
from functools import reduce
from itertools import chain, count, islice
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Sampler

from tercet.distributed.gather import rank, world_size
from tercet.errors import InputError, require
from tercet.messages import warn_once
from tercet.types import BatchDataset, BatchIndices

Ints = npt.NDArray[np.int64]


def rank_slice(size: int) -> slice:
    """This process's part of a global batch of ``size`` rows; the sizes of the parts differ by at most one."""
    return slice(size * rank() // world_size(), size * (rank() + 1) // world_size())


def combine_seeds(*parts: int) -> int:
    """Combine several seeds in one, so that an epoch of one run is not that of a run with the next seed."""
    return reduce(lambda number, part: (number * 1_000_003 + part) % (1 << 63), parts, 0)


class SeededBatchSampler(Sampler[BatchIndices]):
    """The base of samplers that draw global batches from (``seed``, epoch) and give each process its slice.

    ``needs`` is what the source must provide ("label", "position", "all_rows"); ``provides`` is what a batch then has:
    "same_label" (several rows of one label) or "adjacent" (neighboring sentences).
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    provides: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, batch_size: int, seed: int) -> None:
        self.batch_size, self.seed, self.epoch = batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration draws; Lightning calls this."""
        self.epoch = epoch

    def _share(self, rows: Any, number: int) -> BatchIndices:
        """This process's rows of the epoch's global batch ``number``."""
        return BatchIndices(rows[rank_slice(len(rows))].tolist(), combine_seeds(self.seed, self.epoch, number))


class RandomBatchSampler(SeededBatchSampler):
    """Batches of ``batch_size`` rows in random order, each row once an epoch.

    The last rows, which do not fill a batch, are left out: every batch has the same number of negatives.

    >>> [batch.rows for batch in RandomBatchSampler(range(5), batch_size=2, seed=0)]
    [[4, 0], [1, 3]]
    """

    def __init__(self, dataset: Sized, batch_size: int, seed: int) -> None:
        super().__init__(batch_size, seed)
        self.size = len(dataset)

    def __len__(self) -> int:
        return self.size // self.batch_size

    def __iter__(self) -> Iterator[BatchIndices]:
        order = torch.randperm(self.size, generator=torch.Generator().manual_seed(combine_seeds(self.seed, self.epoch)))
        for number in range(len(self)):
            yield self._share(order[number * self.batch_size : (number + 1) * self.batch_size], number)


class NoDuplicatesBatchSampler(SeededBatchSampler):
    """Batches in which no two rows share the text of their anchor or positive, the first two columns.

    Rows come in shuffled passes over all of them. One that shares a text with a row of the batch waits for the next batch;
    where many wait, rows of the next pass fill the batches of the epoch, which has as many as ``RandomBatchSampler``. A batch
    is short where no other row fits. Texts are compared by ``dataset.content_hash (V, N)``.

    >>> from types import SimpleNamespace
    >>> dataset = SimpleNamespace(content_hash=torch.tensor([[7, 7, 8, 9], [1, 2, 3, 4]]))  # a question with two answers
    >>> [batch.rows for batch in NoDuplicatesBatchSampler(dataset, batch_size=2, seed=0)]
    [[2, 0], [1, 3]]
    """

    needs: ClassVar[frozenset[str]] = frozenset({"all_rows"})

    def __init__(self, dataset: BatchDataset, batch_size: int, seed: int) -> None:
        super().__init__(batch_size, seed)
        content = getattr(dataset, "content_hash", None)
        if content is None:
            raise InputError("NoDuplicatesBatchSampler compares texts, and these rows are images. Use RandomBatchSampler.")
        self.texts: list[tuple[int, ...]] = list(zip(*content[:2].tolist(), strict=True))
        most = min(len(set(column)) for column in zip(*self.texts, strict=True))
        advice = f"Use `batch_size`={most} or less, or a sampler that repeats texts, as RandomBatchSampler"
        require(batch_size <= most, f"`batch_size`={batch_size}, but a column has only {most} different texts. {advice}.")

    def __len__(self) -> int:
        return len(self.texts) // self.batch_size

    def __iter__(self) -> Iterator[BatchIndices]:
        for number, rows in zip(range(len(self)), self.batches(), strict=False):
            yield self._share(np.array(rows), number)

    def batches(self) -> Iterator[list[int]]:
        """The epoch's global batches, without end."""
        rng = np.random.default_rng([self.seed, self.epoch])
        passes = (row for _ in count() for row in rng.permutation(len(self.texts)).tolist())
        waiting: dict[int, None] = {}  # rows in the order in which they came
        while True:
            batch, texts = dict[int, None](), set[int]()
            for row in chain(list(waiting), islice(passes, 2 * len(self.texts))):  # a whole pass is among them
                if texts.isdisjoint(self.texts[row]):
                    batch[row] = None
                    texts.update(self.texts[row])
                    waiting.pop(row, None)
                    if len(batch) == self.batch_size:
                        break
                elif row not in batch:
                    waiting[row] = None
            else:
                short = f"a batch has {len(batch)} rows, not `batch_size`={self.batch_size}"
                warn_once(f"NoDuplicatesBatchSampler: {short}: each other row shares a text with one.")
            yield list(batch)


class ResumableSampler(Sampler[BatchIndices]):
    """The rest of an epoch of ``sampler``, for a run that is resumed in its middle, with the steps that batches are for.

    ``progress()`` gives the number of batches that the epoch has had, the step that begins, and how many batches a step has.
    """

    def __init__(self, sampler: Sampler[BatchIndices], progress: Callable[[], tuple[int, int, int]]) -> None:
        self.sampler, self.progress = sampler, progress

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration draws; Lightning calls this."""
        self.sampler.set_epoch(epoch)  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[BatchIndices]:
        processed, step, accumulated = self.progress()
        first = processed % len(self)
        for number, batch in enumerate(islice(self.sampler, first, None), first):
            yield batch._replace(step=step + number // accumulated - first // accumulated)


class PKBatchSampler(SeededBatchSampler):
    """Batches of labels with ``per_label`` K rows each, and ``distractors``: rows that are used only as negatives.

    FaceNet's batch (arXiv:1503.03832, section 3.2) has 1,800 rows, 40 of each label. Labels come in shuffled passes over all
    of them. A label gives K rows that it has not given before, as long as it has any; one with fewer than K rows gives those
    that it has and leaves room for more labels, so that a batch is always full. Distractors are rows whose label occurs once
    or that have none; then random rows of other labels, one of each before any gives a second (which would be its positive);
    then rows of labels in the batch. No row is in a batch twice. Set ``neighbors`` (label to its confusable labels, nearest
    first) to make such labels follow each other in a pass.

    >>> from types import SimpleNamespace
    >>> dataset = SimpleNamespace(label=torch.tensor([0, 0, 1, 1, 2, 2]))
    >>> [sorted(dataset.label[batch.rows].tolist()) for batch in PKBatchSampler(dataset, 4, seed=0, per_label=2)]
    [[1, 1, 2, 2]]
    """

    needs: ClassVar[frozenset[str]] = frozenset({"label", "all_rows"})
    provides: ClassVar[frozenset[str]] = frozenset({"same_label"})

    def __init__(self, dataset: BatchDataset, batch_size: int, seed: int, per_label: int = 40, distractors: int = 0) -> None:
        super().__init__(batch_size, seed)
        self.per_label, self.distractors = per_label, distractors
        self.values = dataset.label.numpy()
        self.size = len(self.values)
        names, index, sizes = np.unique(self.values, return_inverse=True, return_counts=True)
        paired = (sizes >= 2) & (names >= 0)
        groups = zip(names, np.split(np.argsort(index, kind="stable"), np.cumsum(sizes)[:-1]), paired, strict=True)
        self.rows_by_label: dict[int, Ints] = {int(name): group for name, group, is_paired in groups if is_paired}
        self.unpaired_rows: Ints = np.flatnonzero(~paired[index])
        self.neighbors: dict[int, list[int]] = {}
        self._check()

    def _check(self) -> None:
        k, size, room = self.per_label, self.batch_size, self.batch_size - self.distractors
        require(k >= 2, f"`per_label`={k}: 2 or more, so that a row has a positive.")
        require(2 <= room <= size, f"`distractors`={self.distractors}: from 0 to `batch_size` - 2 = {size - 2}.")
        wrong = ""
        if (self.values < 0).all():
            wrong = ": the training rows have no labels"
        elif not self.rows_by_label:
            wrong = " needs labels that occur twice or more, but every one of the training rows has a label of its own, or none"
        elif len(self.rows_by_label) == 1 and len(self.unpaired_rows) == 0:
            wrong = ": all training rows have the same label, so that there are no negatives"
        advice = "use RandomBatchSampler with an objective that needs no labels"
        require(not wrong, f"PKBatchSampler{wrong}. Name the column of labels in the source's label, or {advice}.")
        sizes = [len(rows) for rows in self.rows_by_label.values()]
        most = sum(min(k, rows) for rows in sizes)
        others = f", and {size - room} are distractors" if room < size else ""
        got = f"{len(sizes)} labels with {k} rows at most give {most} rows{others}"
        advice = f"Use `batch_size`={most + size - room}, or a larger `per_label` (now {k})"
        require(most >= room, f"`batch_size`={size}: {got}. {advice}.")
        if max(sizes) < k:
            warn_once(f"per_label={k}: the largest label has {max(sizes)} rows; all give what they have.")

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
        others = rng.permutation(left[~same])
        first = np.sort(np.unique(self.values[others], return_index=True)[1])  # a row of each label
        more = np.concatenate([others[first], np.delete(others, first), rng.permutation(left[same])])
        return np.concatenate([single, more[: count - len(single)]])

    def _labels(self, rng: np.random.Generator) -> Iterator[int]:
        labels = np.array(list(self.rows_by_label))
        while True:
            left, neighbors = dict.fromkeys(rng.permutation(labels).tolist()), self.neighbors
            while left:  # each label is followed by those of its neighbors that have not come yet
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
    batch of Logeswaran and Lee 2018 (arXiv:1803.02893), which never crosses documents here. Each epoch starts at another
    sentence of each document, and shuffles the windows of all documents. Left out and counted in a warning are documents
    shorter than a window, rows without a document or a position, and rows whose position another row of the document has.

    >>> from types import SimpleNamespace
    >>> dataset = SimpleNamespace(label=torch.zeros(6, dtype=torch.long), position=torch.arange(6))
    >>> [batch.rows for batch in WindowBatchSampler(dataset, 3, seed=0, window=3)]
    [[0, 1, 2], [3, 4, 5]]
    """

    needs: ClassVar[frozenset[str]] = frozenset({"label", "position", "all_rows"})
    provides: ClassVar[frozenset[str]] = frozenset({"adjacent"})

    def __init__(self, dataset: BatchDataset, batch_size: int, seed: int, window: int = 400) -> None:
        super().__init__(batch_size, seed)
        self.window = m = window
        require(m >= 2, f"`window`={m}: 2 sentences or more, so that one has a neighbor.")
        near = " or ".join(str(n) for n in (batch_size // m * m, (batch_size // m + 1) * m) if n)
        advice = f"Use `batch_size`={near}, or a `window` that divides it"
        require(batch_size % m == 0, f"`batch_size`={batch_size} is no multiple of `window`={m}. {advice}.")
        label, position = dataset.label.numpy(), dataset.position.numpy()
        missing = "position (the sentence's number in its document)" if (label >= 0).any() else "label (the document)"
        got = f"WindowBatchSampler needs sentences in order, but the training rows have no {missing}"
        advice = "Name the columns in the source's label and position, or use a source of books"
        require((label >= 0).any() and (position >= 0).any(), f"{got}. {advice}.")
        self.documents = self._documents(label, position)
        count = sum(len(rows) // m for rows in self.documents)
        got = f"`batch_size`={batch_size} is {batch_size // m} windows of {m} sentences"
        advice = f"Use `batch_size`={count * m} at most, or a smaller `window`"
        require(len(self), f"{got}, but the training documents hold {count}. {advice}.")

    def _documents(self, label: Ints, position: Ints) -> list[Ints]:
        """The rows of each document that holds a window, in order."""
        order = np.lexsort((position, label))
        order = order[(label[order] >= 0) & (position[order] >= 0)]
        if missing := len(label) - len(order):
            warn_once(f"Windows: {missing} of {len(label)} rows have no document or no position; they are left out.")
        again = (np.diff(label[order], prepend=-1) == 0) & (np.diff(position[order], prepend=-1) == 0)
        if again.any():
            first = f"the first: position {position[order[again][0]]}"
            same = f"{again.sum()} of {len(label)} rows have the position of another row of their document ({first})"
            warn_once(f"Windows: {same}; they are left out.")
        elif (np.diff(order)[np.diff(label[order]) == 0] < 0).any():
            warn_once("Windows: the rows are not stored in order; they are read by document and position.")
        order = order[~again]
        documents = np.split(order, np.flatnonzero(np.diff(label[order])) + 1)
        long = [rows for rows in documents if len(rows) >= self.window]
        longest = max(map(len, documents))
        advice = f"Use `window`={longest} at most, or longer documents." if longest > 1 else "None has neighbors."
        got = f"the longest of {len(documents)} documents has {longest} sentences with a document and a position"
        require(long, f"`window`={self.window}, but {got}. {advice}")
        if short := len(documents) - len(long):
            count = f"{short} of {len(documents)} documents ({len(order) - sum(map(len, long))} sentences)"
            warn_once(f"Windows: {count} are shorter than a window of {self.window}; they are left out.")
        return long

    def __len__(self) -> int:
        return sum(len(rows) // self.window for rows in self.documents) * self.window // self.batch_size

    def __iter__(self) -> Iterator[BatchIndices]:
        k, windows = self.batch_size // self.window, self.windows()
        for number in range(len(self)):
            yield self._share(np.concatenate(windows[number * k : (number + 1) * k]), number)

    def windows(self) -> list[Ints]:
        """The epoch's windows, ``(window,)`` row numbers each, shuffled."""
        rng, m = np.random.default_rng([self.seed, self.epoch]), self.window
        cut = []
        for rows in self.documents:
            count = len(rows) // m
            start = int(rng.integers(len(rows) - count * m + 1))
            cut += list(rows[start : start + count * m].reshape(count, m))
        return [cut[i] for i in rng.permutation(len(cut))]
