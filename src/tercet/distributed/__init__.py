"""Several processes as one: gather with gradient, losses over the global batch, keys in a ring."""

from tercet.distributed.gather import gather_embeddings, gather_rows, rank, reduce_loss, row_counts, world_size

__all__ = ["gather_embeddings", "gather_rows", "rank", "reduce_loss", "row_counts", "world_size"]
