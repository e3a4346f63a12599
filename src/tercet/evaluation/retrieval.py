"""Find a query's documents among all documents."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tercet.contract import Encode, Source
from tercet.error import InputError
from tercet.evaluation.pairs import numbered, text_pairs


@dataclass(frozen=True)
class Retrieval:
    """The first column of a source are queries, the second documents; row i's document is relevant to its query.

    Equal texts are one query or one document, so that a query may have several relevant documents; so do equal labels.
    Exact search by cosine, a block of queries at a time. A document that scores as high as a relevant one counts as
    before it: collapsed embeddings find nothing. Metrics, as means over queries: ``recall@k`` (is any relevant document
    among the first k), ``mrr`` (1 / rank of the first), ``ndcg@10`` and ``map`` (binary relevance).
    """

    name: str
    source: Source
    ks: Sequence[int]

    def __post_init__(self) -> None:
        if not self.ks or min(self.ks) < 1:
            raise InputError(f"evaluation.ks={list(self.ks)}: ranks from 1 on, as [1, 10].")

    def __call__(self, encode: Encode) -> dict[str, float]:
        """``retrieval/<name>/<metric>``."""
        queries, documents, relevant = self._texts()
        z = encode([*queries, *documents])
        x, y = z.split([len(queries), len(documents)])
        found = scores(ranks(x, y, relevant), self.ks)
        return {f"retrieval/{self.name}/{metric}": value for metric, value in found.items()}

    def _texts(self) -> tuple[list[str], list[str], list[list[int]]]:
        first, second, labels = text_pairs(self.source, f"retrieval of {self.name}")
        queries, query_of = numbered(first)
        documents, document_of = numbered(second)
        relevant: list[set[int]] = [set() for _ in queries]
        same: dict[int, set[int]] = {}
        for label, document in zip(labels, document_of, strict=True):
            same.setdefault(label, set()).add(document)
        for query, document, label in zip(query_of, document_of, labels, strict=True):
            relevant[query] |= same[label] if label >= 0 else {document}
        return queries, documents, [sorted(documents) for documents in relevant]


def ranks(x: Tensor, y: Tensor, relevant: Sequence[Sequence[int]], block: int = 512) -> list[Tensor]:
    """For each query the ranks of its relevant documents, from 1 and ascending: ``(Q, D), (M, D)`` to Q tensors.

    Among equal scores the irrelevant come first.
    """
    x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
    out = []
    for start in range(0, len(x), block):
        for row, mine in zip(x[start : start + block] @ y.T, relevant[start : start + block], strict=True):
            wanted = torch.tensor(mine)
            own = row[wanted].sort(descending=True).values
            row[wanted] = torch.nan
            before = torch.stack([(row >= score).sum() for score in own])
            out.append(before + torch.arange(1, len(own) + 1))
    return out


def scores(found: Sequence[Tensor], ks: Sequence[int]) -> dict[str, float]:
    """The metrics of ranks; torchmetrics' retrieval functions agree where nothing is tied."""
    first = torch.stack([r[0] for r in found])
    metrics = {f"recall@{k}": float((first <= k).double().mean()) for k in ks}
    metrics["mrr"] = float((1 / first.double()).mean())
    metrics["ndcg@10"] = float(torch.stack([_ndcg(r, 10) for r in found]).mean())
    metrics["map"] = float(torch.stack([(torch.arange(1, len(r) + 1) / r.double()).mean() for r in found]).mean())
    return metrics


def _ndcg(r: Tensor, k: int) -> Tensor:
    gains = (1 / torch.log2(r[r <= k].double() + 1)).sum()
    ideal = (1 / torch.log2(torch.arange(2, min(len(r), k) + 2).double())).sum()
    return gains / ideal
