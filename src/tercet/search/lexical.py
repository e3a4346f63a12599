"""Search by words: BM25, and the fusion of its ranks with those of vectors."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tercet.errors import import_extra, refuse_damaged, require
from tercet.paths import atomic_folder, check_new_folder
from tercet.search.index import Floats, Index, Ints

CONSTANT = 60  # of reciprocal rank fusion (Cormack, Clarke and Buettcher 2009)
DEPTH = 10  # results of each ranking that are fused, for each that is wanted


class BM25:
    """N texts, searched by the words that they share with a query (Robertson's BM25, by bm25s).

    >>> BM25(["The cat sat.", "A dog ran.", "Cats and dogs."]).search(["Where sat the cat?"], 1)[1]
    array([[0]])
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self.engine = import_extra("bm25s", "search").BM25()
        require(len(texts), "`texts` are empty: there is nothing to search.")
        words = _words(texts, vocabulary=True)
        require(any(words.ids), "`texts` hold no words, only signs: search by vectors alone.")
        self.engine.index(words, show_progress=False)
        self.count = len(texts)

    def search(self, queries: Sequence[str], k: int) -> tuple[Floats, Ints]:
        """The k texts that share most with each query: scores ``(Q, k)``, falling, and row numbers; -inf and -1 for none."""
        k = min(k, self.count)
        scores, rows = np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1)
        for i, words in enumerate(_words(queries)):
            found = self.engine.get_scores(words) if any(word in self.engine.vocab_dict for word in words) else np.zeros(0)
            order = np.argsort(-found, kind="stable")[:k]
            order = order[found[order] > 0]
            scores[i, : len(order)], rows[i, : len(order)] = found[order], order
        return scores, rows

    def save(self, folder: Path) -> None:
        """Write the folder, which must be new or empty."""
        check_new_folder(folder, "folder")
        with atomic_folder(folder) as made:
            self.engine.save(str(made))

    @classmethod
    def load(cls, folder: Path, count: int) -> "BM25":
        """What was saved of ``count`` texts."""
        bm25s = import_extra("bm25s", "search")
        made = cls.__new__(cls)
        with refuse_damaged(str(folder), "cannot be read", "Build it anew."):
            made.engine, made.count = bm25s.BM25.load(str(folder)), count
            found = made.engine.scores["num_docs"]
            require(found == count, f"{folder} is of {found} texts, not {count}.")
        return made


def _words(texts: Sequence[str], vocabulary: bool = False) -> Any:
    """The words of each text, in lower case: a list of lists, or for ``vocabulary`` as numbers with the vocabulary."""
    options = {"token_pattern": r"(?u)\b\w+\b", "stopwords": None, "show_progress": False}  # words of one letter count, too
    return import_extra("bm25s", "search").tokenize(list(texts), return_ids=vocabulary, **options)


def reciprocal_rank_fusion(rankings: Sequence[Ints], k: int) -> tuple[Floats, Ints]:
    """Fuse rankings ``(Q, C)`` of row numbers, best first, -1 for none: scores ``(Q, k)``, falling, and row numbers.

    The score of a row is the sum of 1 / (60 + rank) over the rankings that have it. Where there are fewer than k rows the rest
    is -inf and -1.

    >>> reciprocal_rank_fusion([np.array([[3, 1]]), np.array([[1, 2]])], 3)[1]
    array([[1, 3, 2]])
    """
    count = len(rankings[0])
    scores, rows = np.full((count, k), -np.inf, np.float32), np.full((count, k), -1)
    for query in range(count):
        total: dict[int, float] = {}
        for ranking in rankings:
            for rank, row in enumerate(ranking[query].tolist(), 1):
                if row >= 0:
                    total[row] = total.get(row, 0.0) + 1 / (CONSTANT + rank)
        best = sorted(total, key=lambda row: (-total[row], row))[:k]
        scores[query, : len(best)], rows[query, : len(best)] = [total[row] for row in best], best
    return scores, rows


def search_hybrid(index: Index, words: BM25, vectors: Any, texts: Sequence[str], k: int) -> tuple[Floats, Ints]:
    """The k rows that vectors ``(Q, D)`` and words of Q ``texts`` rank best together: scores and row numbers ``(Q, k)``.

    >>> texts = ["Invoice 4711", "A bill", "A dog"]
    >>> index = Index.build(np.eye(3, dtype=np.float32), texts)
    >>> search_hybrid(index, BM25(texts), np.array([[0.1, 1.0, 0.0]]), ["4711"], 2)[1]
    array([[0, 1]])
    """
    depth = min(len(index), DEPTH * k)
    return reciprocal_rank_fusion([index.search(vectors, depth)[1], words.search(texts, depth)[1]], min(k, len(index)))
