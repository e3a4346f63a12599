"""Retrieval: find a query's documents among all documents."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tercet.evaluation.inputs import Rows, check_ranks, check_source, distinct, embed_columns, text_pairs
from tercet.types import EncodeFunction

TIE = 1e-6  # cosines that differ by less are equal: float32 rounds those of equal rows apart, depending on their position


@dataclass(frozen=True)
class Retrieval:
    """The first column of a source are queries, the second documents; row i's document is relevant to its query.

    Of a source of one column the first half of each text is the query, the second its document; see ``text_pairs``. Equal
    texts are one query or one document, so that a query may have several relevant documents, and so are rows of equal label.
    Exact search by cosine. A document that scores as high as a relevant one counts as before it: collapsed embeddings find
    nothing. ``retrieval/<name>/...``, means over queries: ``recall@k`` (is any relevant document among the first k), ``mrr``
    (1 / rank of the first), ``ndcg@10`` and ``map`` (binary relevance). ``ks`` are the numbers k of ``recall@k``.

    >>> source = {"question": ["ab", "cd"], "answer": ["aab", "dd"]}
    >>> encode = lambda texts: torch.tensor([[text.count(letter) for letter in "abcd"] for text in texts])
    >>> Retrieval(source, ks=[1])(encode)["retrieval/pairs/recall@1"]
    1.0
    """

    source: Rows
    ks: Sequence[int] = (1, 10)
    name: str = "pairs"
    smaller_is_better: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        check_source("retrieval", self.name, self.source)
        check_ranks(self.ks)

    def __call__(self, encode: EncodeFunction) -> dict[str, float]:
        """Measure, with one call of ``encode``; a model with a prompt for queries or documents uses it."""
        return {name: float(values.mean()) for name, values in self.examples(encode).items()}

    def examples(self, encode: EncodeFunction) -> dict[str, Tensor]:
        """The metrics of each query, ``(Q,)``, whose means ``__call__`` returns."""
        queries, documents, relevant = self._texts()
        x, y = embed_columns(encode, queries, documents)
        values = query_metrics(relevant_ranks(x, y, relevant), self.ks)
        return {f"retrieval/{self.name}/{metric}": of_queries for metric, of_queries in values.items()}

    def _texts(self) -> tuple[list[str], list[str], list[list[int]]]:
        """Distinct queries, distinct documents, and each query's relevant documents by index."""
        first, second, labels = text_pairs(self.source, f"retrieval of {self.name}")
        queries, query_of = distinct(first)
        documents, document_of = distinct(second)
        relevant: list[set[int]] = [set() for _ in queries]
        same = defaultdict(set)
        for label, document in zip(labels, document_of, strict=True):
            same[label].add(document)
        for query, document, label in zip(query_of, document_of, labels, strict=True):
            relevant[query] |= same[label] if label >= 0 else {document}
        return queries, documents, [sorted(documents) for documents in relevant]


def relevant_ranks(x: Tensor, y: Tensor, relevant: Sequence[Sequence[int]], block: int = 256) -> list[Tensor]:
    """For each query the ranks of its relevant documents, from 1 and ascending: ``(Q, D), (M, D)`` to Q tensors.

    Among equal scores the irrelevant come first; NaN is the lowest score.
    """
    x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
    out: list[Tensor] = []
    for start in range(0, len(x), block):
        documents = [torch.tensor(some) for some in relevant[start : start + block]]
        cosine, own = (x[start : start + block] @ y.T).nan_to_num(-2.0), []
        for row, some in zip(cosine, documents, strict=True):
            own.append(row[some])
            row[some] = -torch.inf
        cosine.numpy().sort(axis=1)  # several times as fast as torch's on a CPU
        best = pad_sequence(own, batch_first=True, padding_value=-torch.inf).sort(descending=True).values
        ranks = len(y) - torch.searchsorted(cosine, best - TIE) + torch.arange(1, best.shape[1] + 1)
        out.extend(row[: len(some)] for row, some in zip(ranks, documents, strict=True))
    return out


def query_metrics(ranks: Sequence[Tensor], ks: Sequence[int]) -> dict[str, Tensor]:
    """``(Q,)``, from each query's ranks of relevant documents; torchmetrics takes 15 times as long, and ranks ties by index."""
    first = torch.stack([r[0] for r in ranks])
    metrics = {f"recall@{k}": (first <= k).double() for k in ks}
    metrics["mrr"] = 1 / first.double()
    both = [(r, torch.arange(1, len(r) + 1)) for r in ranks]  # the ranks found, and the best
    metrics["ndcg@10"] = torch.stack([_gain(r[r <= 10]) / _gain(best[:10]) for r, best in both])
    metrics["map"] = torch.stack([(best / r.double()).mean() for r, best in both])
    return metrics


def _gain(ranks: Tensor) -> Tensor:
    return (1 / torch.log2(ranks.double() + 1)).sum()
