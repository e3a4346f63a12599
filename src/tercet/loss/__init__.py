"""``(anchors, keys) -> Terms``: pure functions of embeddings."""

from tercet.loss.infonce import InfoNCE
from tercet.loss.triplet import Triplet

__all__ = ["InfoNCE", "Triplet"]
