"""SimCSE: Simple Contrastive Learning of Sentence Embeddings (Gao, Yao and Chen 2021, arXiv:2104.08821)."""

from typing import ClassVar

from tercet.contract import Batch
from tercet.objective.contrastive import Contrastive


class SimCSEUnsup(Contrastive):
    """One text twice: two dropout masks are the two views (section 3). Further columns are not looked at."""

    columns: ClassVar[tuple[int, int]] = (1, 3)
    dropout_views: ClassVar[bool] = True

    def views(self, batch: Batch) -> Batch:
        """The first column, twice."""
        return batch.columns(0, 0)


class SimCSESup(Contrastive):
    """Premise and entailment, and optionally a contradiction as the hard negative (section 4): two or three columns."""

    columns: ClassVar[tuple[int, int]] = (2, 3)
