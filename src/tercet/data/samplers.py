"""Batch samplers: random rows, P labels of K rows, windows of consecutive sentences."""

from collections.abc import Callable, Iterator
from itertools import islice, repeat

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Sampler

from tercet.distributed.gather import rank, world_size
from tercet.errors import InputError
from tercet.messages import warn_once
from tercet.types import BatchDataset, BatchIndices


def rank_slice(size: int) -> slice:
    """This process's part of a global batch of ``size`` rows; parts differ by at most one row."""
    return slice(size * rank() // world_size(), size * (rank() + 1) // world_size())


def combine_seeds(*parts: int) -> int:
    """Several seeds in one number: epochs of one run never meet those of a run with a seed nearby."""
    number = 0
    for part in parts:
        number = (number * 1_000_003 + part) % (1 << 63)
    return number


class RandomBatchSampler(Sampler[BatchIndices]):
    """Each epoch a permutation of the rows drawn from (seed, epoch) alone, cut into batches of ``batch_size``.

    The number of processes changes nothing: together they hold the same rows. The tail that fills no batch is left
    out (every batch has the same number of negatives); another epoch leaves out other rows.
    """

    def __init__(self, rows: BatchDataset, batch_size: int, seed: int) -> None:
        self.rows = len(rows)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning says which epoch begins."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows // self.batch_size

    def __iter__(self) -> Iterator[BatchIndices]:
        generator = torch.Generator().manual_seed(combine_seeds(self.seed, self.epoch))
        order = torch.randperm(self.rows, generator=generator)
        own = rank_slice(self.batch_size)
        for number in range(len(self)):
            rows = order[number * self.batch_size : (number + 1) * self.batch_size]
            yield BatchIndices(rows[own].tolist(), combine_seeds(self.seed, self.epoch, number))


class ResumableSampler(Sampler[BatchIndices]):
    """What is left of an epoch where a run goes on in the middle of it: ``done`` says how many batches it has had."""

    def __init__(self, whole: Sampler[BatchIndices], done: Callable[[], int]) -> None:
        self.whole = whole
        self.done = done

    def set_epoch(self, epoch: int) -> None:
        """Lightning says which epoch begins."""
        self.whole.set_epoch(epoch)  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return len(self.whole)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[BatchIndices]:
        yield from islice(self.whole, self.done() % len(self), None)


Ints = npt.NDArray[np.int64]


class PKBatchSampler(Sampler[BatchIndices]):
    """Global batches of labels, ``per_label`` K rows of each, and ``distractors``: rows that are negatives only.

    FaceNet's batch (arXiv:1503.03832, section 3.2) is batch_size 1800, per_label 40. Labels come in passes: each once
    in a shuffled pass, then a new pass. A label gives K rows that it has not given before, as long as it has any; one
    with fewer than K gives what it has and makes room for more labels, so that a batch is always full. Distractors are
    rows whose label occurs once or that have none; then rows of labels that are not in the batch; where those run out
    too, rows of labels that are. No row is in a batch twice.

    All of it is drawn from (seed, epoch) for the global batch and sliced by process, so that the number of processes
    changes nothing, and the n-th batch of an epoch can be had again. An epoch has as many batches as the rows fill.

    ``neighbours`` (label to its confusable labels, nearest first) makes such labels follow each other in a pass, so that
    they share batches: ``callback.HardLabels`` sets it.
    """

    def __init__(self, rows: BatchDataset, batch_size: int, seed: int, per_label: int, distractors: int) -> None:
        values = rows.label.numpy()
        names, place, sizes = np.unique(values, return_inverse=True, return_counts=True)
        paired = (sizes >= 2) & (names >= 0)
        self.batch_size, self.seed, self.epoch = batch_size, seed, 0
        self.per_label, self.distractors = per_label, distractors
        self.size = len(values)
        order = np.argsort(place, kind="stable")
        groups = np.split(order, np.cumsum(sizes)[:-1])
        self.rows_by_label: dict[int, Ints] = {
            int(name): group for name, group, two in zip(names, groups, paired, strict=True) if two
        }
        self.unpaired_rows: Ints = np.flatnonzero(~paired[place])
        self.values = values
        self.neighbors: dict[int, list[int]] = {}
        self._check()

    def _check(self) -> None:
        if self.per_label < 2:
            raise InputError(f"sampler.per_label={self.per_label}: 2 or more, so that a row has a positive.")
        if not 0 <= self.distractors <= self.batch_size - 2:
            raise InputError(f"sampler.distractors={self.distractors}: from 0 to data.batch_size - 2 = {self.batch_size - 2}.")
        if (self.values < 0).all():
            raise InputError(
                "sampler=pk: the training rows have no labels. Name their column with data.label=..., or use "
                "sampler=random (and an objective that needs no labels, such as objective=simcse_unsup)."
            )
        if not self.rows_by_label:
            raise InputError(
                "sampler=pk needs labels that occur twice or more, but every one of the training rows has a label of "
                "its own, or none. Name the right column in data.label."
            )
        if len(self.rows_by_label) == 1 and len(self.unpaired_rows) == 0:
            raise InputError(
                "sampler=pk: all training rows have the same label, so that there are no negatives. Name another "
                "column in data.label."
            )
        room = self.batch_size - self.distractors
        most = sum(min(self.per_label, len(rows)) for rows in self.rows_by_label.values())
        if most < room:
            raise InputError(
                f"data.batch_size={self.batch_size}: {len(self.rows_by_label)} labels with {self.per_label} rows at most give "
                f"{most} rows{f', and {self.distractors} are distractors' if self.distractors else ''}. Use "
                f"data.batch_size={most + self.distractors}, or a larger sampler.per_label (now {self.per_label})."
            )
        if (largest := max(map(len, self.rows_by_label.values()))) < self.per_label:
            warn_once(f"sampler.per_label={self.per_label}: the largest label has {largest} rows; all give what they have.")

    def set_epoch(self, epoch: int) -> None:
        """Lightning says which epoch begins."""
        self.epoch = epoch

    def __len__(self) -> int:
        return max(1, self.size // self.batch_size)

    def __iter__(self) -> Iterator[BatchIndices]:
        for number, rows in zip(range(len(self)), self.batches(), strict=False):
            yield BatchIndices(rows[rank_slice(len(rows))].tolist(), combine_seeds(self.seed, self.epoch, number))

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
                    late.append(label)  # its next pass began in this batch: first of the next one
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
            yield from _beside(order, self.neighbors) if self.neighbors else order


def _beside(order: list[int], neighbours: dict[int, list[int]]) -> Iterator[int]:
    """The labels in their order, but each followed by those of its neighbours that have not come yet."""
    left = dict.fromkeys(order)
    while left:
        label = next(iter(left))
        for name in (label, *neighbours.get(label, [])):
            if name in left:
                del left[name]
                yield name


class _Queue:
    """Rows in a random order, then in another; never one twice in what is taken at once."""

    def __init__(self, rows: Ints, rng: np.random.Generator) -> None:
        self.rows, self.rng = rows, rng
        self.order: Ints = rng.permutation(rows)
        self.size = len(rows)

    def take(self, count: int) -> Ints:
        taken, self.order = self.order[:count], self.order[count:]
        if len(taken) < count:
            again = self.rng.permutation(self.rows)
            fresh = again[~np.isin(again, taken)]
            more = fresh[: count - len(taken)]
            self.order = again[~np.isin(again, more)]
            taken = np.concatenate([taken, more])
        return taken


class WindowBatchSampler(Sampler[BatchIndices]):
    """Global batches of k windows of ``window`` sentences m that follow each other in a document: k · m = ``batch_size``.

    The document is a row's ``label``, its place in it ``position``; in which order the rows are stored does not matter.
    k = 1, m = 400 is the batch of Logeswaran and Lee 2018 (arXiv:1803.02893), which crosses no document here; several
    shorter windows make the other keys less alike.

    In each epoch a document is cut from another place on, so that its windows and what fills none differ; the windows of
    all documents are shuffled. All of it is drawn from (seed, epoch) for the global batch and sliced by process.
    Left out, counted and said: rows of documents that are shorter than a window, rows without a document or a place, and
    of rows at the same place in a document all but the first.
    """

    def __init__(self, rows: BatchDataset, batch_size: int, seed: int, window: int) -> None:
        self.batch_size, self.seed, self.window, self.epoch = batch_size, seed, window, 0
        self._check()
        label, position = rows.label.numpy(), rows.position.numpy()
        if (label < 0).all() or (position < 0).all():
            lacks = "data.position (the sentence's number in it)" if (label >= 0).any() else "data.label (the document)"
            raise InputError(
                f"sampler=window needs sentences in order, but the training rows have no {lacks}. Name the columns in "
                "data.label and data.position, or use data=books or data=raw_books."
            )
        self.documents = self._documents(label, position)
        if len(self) == 0:
            count = sum(self._count(len(rows)) for rows in self.documents)
            raise InputError(
                f"data.batch_size={batch_size} is {batch_size // window} windows of {window} sentences, but the training "
                f"documents hold {count}. Use data.batch_size={count * window} at most, or a smaller sampler.window."
            )

    def _check(self) -> None:
        m, size = self.window, self.batch_size
        if m < 2:
            raise InputError(f"sampler.window={m}: 2 sentences or more, so that one has a neighbour.")
        if size % m:
            near = " or ".join(str(n) for n in (size // m * m, (size // m + 1) * m) if n)
            raise InputError(
                f"data.batch_size={size} is no multiple of sampler.window={m}. Use data.batch_size={near}, or a window "
                "that divides it."
            )

    def _documents(self, label: Ints, position: Ints) -> list[Ints]:
        """The rows of each document that holds a window, in order."""
        order = np.lexsort((position, label))
        order = order[(label[order] >= 0) & (position[order] >= 0)]
        if nameless := len(label) - len(order):
            warn_once(f"sampler=window: {nameless} of {len(label)} rows have no document or no place; they are left out.")
        again = (np.diff(label[order], prepend=-1) == 0) & (np.diff(position[order], prepend=-1) == 0)
        if again.any():
            row = int(order[again][0])
            warn_once(
                f"sampler=window: {int(again.sum())} of {len(label)} rows stand at a place of their document that "
                f"another row has too (the first: position {position[row]}); they are left out."
            )
        elif (np.diff(order)[np.diff(label[order]) == 0] < 0).any():
            warn_once("sampler=window: the rows are not stored in order; they are read by document and position.")
        order = order[~again]
        found = np.split(order, np.flatnonzero(np.diff(label[order])) + 1)
        kept = [rows for rows in found if len(rows) >= self.window]
        if not kept:
            longest = max(map(len, found))
            smaller = f"Use a window of {longest} at most, or longer documents." if longest > 1 else "None has neighbours."
            raise InputError(
                f"sampler.window={self.window}, but the longest of {len(found)} documents has {longest} sentences with a "
                f"document and a place. {smaller}"
            )
        if short := len(found) - len(kept):
            left = len(order) - sum(map(len, kept))
            warn_once(
                f"sampler=window: {short} of {len(found)} documents ({left} sentences) are shorter than a window of "
                f"{self.window}; they are left out."
            )
        return kept

    def set_epoch(self, epoch: int) -> None:
        """Lightning says which epoch begins."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(self._count(len(rows)) for rows in self.documents) * self.window // self.batch_size

    def __iter__(self) -> Iterator[BatchIndices]:
        own, k = rank_slice(self.batch_size), self.batch_size // self.window
        windows = self.windows()
        for number in range(len(self)):
            rows = np.concatenate(windows[number * k : (number + 1) * k])
            yield BatchIndices(rows[own].tolist(), combine_seeds(self.seed, self.epoch, number))

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
