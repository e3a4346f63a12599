"""Batches of consecutive sentences: what Quick-Thoughts contrasts."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from tercet.contract import Draw, Rows
from tercet.data.batches import one_number, own_slice
from tercet.error import InputError
from tercet.notice import say_once

Ints = npt.NDArray[np.int64]


class WindowBatches(Sampler[Draw]):
    """Global batches of k windows of ``window`` sentences m that follow each other in a document: k · m = ``batch_size``.

    The document is a row's ``label``, its place in it ``position``; in which order the rows are stored does not matter.
    k = 1, m = 400 is the batch of Logeswaran and Lee 2018 (arXiv:1803.02893), which crosses no document here; several
    shorter windows make the other keys less alike.

    In each epoch a document is cut from another place on, so that its windows and what fills none differ; the windows of
    all documents are shuffled. All of it is drawn from (seed, epoch) for the global batch and sliced by process.
    Left out, counted and said: rows of documents that are shorter than a window, rows without a document or a place, and
    of rows at the same place in a document all but the first.
    """

    def __init__(self, rows: Rows, batch_size: int, seed: int, window: int) -> None:
        self.batch_size, self.seed, self.window, self.epoch = batch_size, seed, window, 0
        self._check()
        label, position = rows.label.numpy(), rows.position.numpy()
        if (label < 0).all() or (position < 0).all():
            lacks = "data.position (the sentence's number in it)" if (label >= 0).any() else "data.label (the document)"
            raise InputError(
                f"batches=windows needs sentences in order, but the training rows have no {lacks}. Name the columns in "
                "data.label and data.position, or use data=books or data=raw_books."
            )
        self.documents = self._documents(label, position)
        if len(self) == 0:
            count = sum(self._count(len(rows)) for rows in self.documents)
            raise InputError(
                f"data.batch_size={batch_size} is {batch_size // window} windows of {window} sentences, but the training "
                f"documents hold {count}. Use data.batch_size={count * window} at most, or a smaller batches.window."
            )

    def _check(self) -> None:
        m, size = self.window, self.batch_size
        if m < 2:
            raise InputError(f"batches.window={m}: 2 sentences or more, so that one has a neighbour.")
        if size % m:
            near = " or ".join(str(n) for n in (size // m * m, (size // m + 1) * m) if n)
            raise InputError(
                f"data.batch_size={size} is no multiple of batches.window={m}. Use data.batch_size={near}, or a window "
                "that divides it."
            )

    def _documents(self, label: Ints, position: Ints) -> list[Ints]:
        """The rows of each document that holds a window, in order."""
        order = np.lexsort((position, label))
        order = order[(label[order] >= 0) & (position[order] >= 0)]
        if nameless := len(label) - len(order):
            say_once(
                f"batches=windows: {nameless} of {len(label)} rows have no document or no place; they are left out."
            )
        again = (np.diff(label[order], prepend=-1) == 0) & (np.diff(position[order], prepend=-1) == 0)
        if again.any():
            row = int(order[again][0])
            say_once(
                f"batches=windows: {int(again.sum())} of {len(label)} rows stand at a place of their document that "
                f"another row has too (the first: position {position[row]}); they are left out."
            )
        elif (np.diff(order)[np.diff(label[order]) == 0] < 0).any():
            say_once("batches=windows: the rows are not stored in order; they are read by document and position.")
        order = order[~again]
        found = np.split(order, np.flatnonzero(np.diff(label[order])) + 1)
        kept = [rows for rows in found if len(rows) >= self.window]
        if not kept:
            longest = max(map(len, found))
            smaller = (
                f"Use a window of {longest} at most, or longer documents." if longest > 1 else "None has neighbours."
            )
            raise InputError(
                f"batches.window={self.window}, but the longest of {len(found)} documents has {longest} sentences with a "
                f"document and a place. {smaller}"
            )
        if short := len(found) - len(kept):
            left = len(order) - sum(map(len, kept))
            say_once(
                f"batches=windows: {short} of {len(found)} documents ({left} sentences) are shorter than a window of "
                f"{self.window}; they are left out."
            )
        return kept

    def set_epoch(self, epoch: int) -> None:
        """Lightning says which epoch begins."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(self._count(len(rows)) for rows in self.documents) * self.window // self.batch_size

    def __iter__(self) -> Iterator[Draw]:
        own, k = own_slice(self.batch_size), self.batch_size // self.window
        windows = self.windows()
        for number in range(len(self)):
            rows = np.concatenate(windows[number * k : (number + 1) * k])
            yield Draw(rows[own].tolist(), one_number(self.seed, self.epoch, number))

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
