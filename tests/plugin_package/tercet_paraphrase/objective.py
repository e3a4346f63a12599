"""An objective on labeled pairs."""

from typing import ClassVar

from tercet.training.contrastive import Contrastive
from tercet.types import Batch


class LabeledParaphrase(Contrastive):
    """Two texts of the same meaning; those of other rows with the same label are positives, too."""

    columns: ClassVar[tuple[int, int]] = (2, 2)
    positives: ClassVar[str] = "label"

    @classmethod
    def needs(cls, num_columns: int) -> frozenset[str]:
        """Several rows of one label in a batch."""
        return frozenset({"same_label"})

    @staticmethod
    def views(batch: Batch, step: int) -> Batch:
        """Both columns."""
        return batch.select_columns(0, 1)
