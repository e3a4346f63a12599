"""Several processes as one: losses over the global batch, keys that are gathered or circulate in a ring, sharded weights."""

from tercet.distributed.gather import gather_rows, rank, reduce_loss, world_size
from tercet.distributed.ring import contrast

__all__ = ["contrast", "gather_rows", "rank", "reduce_loss", "world_size"]
