"""``(anchors, keys) -> Terms``: pure functions of embeddings."""

from tercet.loss.infonce import InfoNCE

__all__ = ["InfoNCE"]
