"""One name for a run, the same in all of its processes."""

import os
import secrets
import time


def run_id() -> str:
    """``RUN_ID``, else SLURM's job and step, else what the first process of torchrun chose, else the time and four digits."""
    if value := os.environ.get("RUN_ID"):
        return value
    if int(os.environ.get("SLURM_NTASKS", 1)) > 1:
        return "-".join(os.environ[name] for name in ("SLURM_JOB_ID", "SLURM_STEP_ID") if name in os.environ)
    fresh = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    if not os.environ.get("TORCHELASTIC_RUN_ID"):
        return fresh
    # Started by torchrun: the processes share its store and nothing else yet.
    from torch.distributed.rendezvous import rendezvous

    store, rank, _ = next(rendezvous("env://"))
    if rank == 0:
        store.set("tercet/run_id", fresh)
    return str(store.get("tercet/run_id").decode())
