"""``(anchors, keys) -> Terms``: pure functions of embeddings."""

from tercet.loss.context import Context
from tercet.loss.infonce import InfoNCE
from tercet.loss.triplet import Triplet

__all__ = ["Context", "InfoNCE", "Triplet"]
