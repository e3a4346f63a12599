"""Batches of P labels with K rows each: what triplets are mined from."""

from collections.abc import Iterator
from itertools import repeat

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from tercet.contract import Draw, Rows
from tercet.data.batches import one_number, own_slice
from tercet.error import InputError
from tercet.notice import say_once

Ints = npt.NDArray[np.int64]


class LabelBatches(Sampler[Draw]):
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

    def __init__(self, rows: Rows, batch_size: int, seed: int, per_label: int, distractors: int) -> None:
        values = rows.label.numpy()
        names, place, sizes = np.unique(values, return_inverse=True, return_counts=True)
        paired = (sizes >= 2) & (names >= 0)
        self.batch_size, self.seed, self.epoch = batch_size, seed, 0
        self.per_label, self.distractors = per_label, distractors
        self.size = len(values)
        order = np.argsort(place, kind="stable")
        groups = np.split(order, np.cumsum(sizes)[:-1])
        self.members: dict[int, Ints] = {
            int(name): group for name, group, two in zip(names, groups, paired, strict=True) if two
        }
        self.rest: Ints = np.flatnonzero(~paired[place])
        self.values = values
        self.neighbours: dict[int, list[int]] = {}
        self._check()

    def _check(self) -> None:
        if self.per_label < 2:
            raise InputError(f"batches.per_label={self.per_label}: 2 or more, so that a row has a positive.")
        if not 0 <= self.distractors <= self.batch_size - 2:
            raise InputError(
                f"batches.distractors={self.distractors}: from 0 to data.batch_size - 2 = {self.batch_size - 2}."
            )
        if (self.values < 0).all():
            raise InputError(
                "batches=labels: the training rows have no labels. Name their column with data.label=..., or use "
                "batches=random (and an objective that needs no labels, such as objective=simcse_unsup)."
            )
        if not self.members:
            raise InputError(
                "batches=labels needs labels that occur twice or more, but every one of the training rows has a label of "
                "its own, or none. Name the right column in data.label."
            )
        if len(self.members) == 1 and len(self.rest) == 0:
            raise InputError(
                "batches=labels: all training rows have the same label, so that there are no negatives. Name another "
                "column in data.label."
            )
        room = self.batch_size - self.distractors
        most = sum(min(self.per_label, len(rows)) for rows in self.members.values())
        if most < room:
            raise InputError(
                f"data.batch_size={self.batch_size}: {len(self.members)} labels with {self.per_label} rows at most give "
                f"{most} rows{f', and {self.distractors} are distractors' if self.distractors else ''}. Use "
                f"data.batch_size={most + self.distractors}, or a larger batches.per_label (now {self.per_label})."
            )
        if (largest := max(map(len, self.members.values()))) < self.per_label:
            say_once(
                f"batches.per_label={self.per_label}: the largest label has {largest} rows; all give what they have."
            )

    def set_epoch(self, epoch: int) -> None:
        """Lightning says which epoch begins."""
        self.epoch = epoch

    def __len__(self) -> int:
        return max(1, self.size // self.batch_size)

    def __iter__(self) -> Iterator[Draw]:
        for number, rows in zip(range(len(self)), self.batches(), strict=False):
            yield Draw(rows[own_slice(len(rows))].tolist(), one_number(self.seed, self.epoch, number))

    def batches(self) -> Iterator[Ints]:
        """The epoch's global batches, ``(batch_size,)`` row numbers each, without end."""
        rng = np.random.default_rng([self.seed, self.epoch])
        queues = {label: _Queue(rows, rng) for label, rows in self.members.items()}
        rest = _Queue(self.rest, rng) if len(self.rest) else None
        passes, waiting = self._labels(rng), list[int]()
        while True:
            room, taken, used, late = self.batch_size - self.distractors, list[Ints](), set[int](), list[int]()
            while room >= 2:
                label = waiting.pop(0) if waiting else next(passes)
                if label in used:
                    late.append(label)  # its next pass began in this batch: first of the next one
                    continue
                used.add(label)
                taken.append(queues[label].take(min(self.per_label, room, len(self.members[label]))))
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
        labels = np.array(list(self.members))
        for _ in repeat(None):
            order = rng.permutation(labels).tolist()
            yield from _beside(order, self.neighbours) if self.neighbours else order


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
