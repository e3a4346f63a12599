"""One name for a run, the same in all of its processes."""

import os
import secrets
import time


def run_id() -> str:
    """``RUN_ID``, else SLURM's job id, else what the first process of torchrun chose, else the time and four digits."""
    for name in ("RUN_ID", "SLURM_JOB_ID"):
        if value := os.environ.get(name):
            return value
    fresh = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    if not os.environ.get("TORCHELASTIC_RUN_ID"):
        return fresh
    # Started by torchrun: the processes share its store and nothing else yet.
    from torch.distributed.rendezvous import rendezvous

    store, rank, _ = next(rendezvous("env://"))
    if rank == 0:
        store.set("tercet/run_id", fresh)
    return str(store.get("tercet/run_id").decode())
