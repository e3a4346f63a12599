"""What the terminal shows beside the progress bar."""

import logging
import sys
import warnings

from tercet.distributed import rank


def say(line: str) -> None:
    """One line for the user, from the first process only."""
    if rank() == 0:
        print(line, file=sys.stderr, flush=True)


def quiet() -> None:
    """Silence what libraries say about choices that are made here on purpose, and their tips."""
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.basicConfig(format="%(message)s")  # the counts of dropped rows
    for text in (
        ".*does not have many workers.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*It is recommended to use `self.log.*sync_dist=True.*",
        ".*lr_scheduler.step.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*Experiment logs directory .* exists and is not empty.*",
        ".*Total length of `DataLoader` across ranks is zero.*",
        ".*Trying to infer the `batch_size`.*",
        ".*tensorboardX.*",
        ".*You have overridden `transfer_batch_to_device`.*",
        ".*is smaller than the logging interval.*",
        ".*your dataloader is not resumable.*",
        ".*using `DistributedSampler` with the dataloaders.*",
    ):
        warnings.filterwarnings("ignore", message=text)


def before_after(before: dict[str, float], after: dict[str, float]) -> str:
    """The table *before → after*: metrics without their stage."""
    names = [name for name in after if name in before or not before]
    width = max(map(len, names), default=0)
    head = f"{'':{width}}  {'before':>9}      {'after':>9}"
    rows = [f"{n:{width}}  {_number(before.get(n)):>9}  →  {_number(after[n]):>10}" for n in names]
    return "\n".join([head, *rows])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
