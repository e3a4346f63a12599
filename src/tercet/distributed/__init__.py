"""Several processes as one: gather with gradient, losses over the global batch, keys that circulate in a ring.

Sharded weights (FSDP2) are in ``tercet.distributed.sharding``.
"""

from tercet.distributed.gather import gather_embeddings, gather_rows, rank, reduce_loss, row_counts, world_size
from tercet.distributed.ring import contrast

__all__ = ["contrast", "gather_embeddings", "gather_rows", "rank", "reduce_loss", "row_counts", "world_size"]
