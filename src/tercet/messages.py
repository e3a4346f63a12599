"""Messages to the user: status lines, and warnings that are printed once."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

_reported: set[str] = set()


@cache
def warn_once(message: str) -> None:
    """Log a warning; the same message is logged once in a process."""
    logging.getLogger("tercet").warning(message)


def describe_logger(logger: Any) -> str:
    """Name a logger and the folder it writes to."""
    return f"{type(logger).__name__} in {logger.save_dir}"


@contextmanager
def log_errors(what: str, kind: type[Exception] = OSError) -> Iterator[None]:
    """Log an error of this kind instead of raising it, so that the run goes on; once for each ``what``."""
    try:
        yield
    except kind as error:
        if what not in _reported:
            _reported.add(what)
            logging.getLogger("tercet").warning(f"{what}: {type(error).__name__}: {error}; the run goes on without it.")


def print_status(line: str) -> None:
    """Print one line to stderr, from the first process only."""
    from tercet.distributed.gather import rank  # imports torch, which this module does not need otherwise

    if rank() == 0:
        print(line, file=sys.stderr, flush=True)


def silence_libraries() -> None:
    """Silence tips of libraries, and their warnings about choices that are made on purpose here."""
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.basicConfig(format="%(message)s")  # counts of dropped rows
    texts = (
        "does not have many workers|directory .* exists and is not empty|It is recommended to use `self.log.*sync_dist=True|"
        "lr_scheduler.step|isinstance.treespec, LeafSpec|Total length of `DataLoader` across ranks is zero|tensorboardX|"
        "Trying to infer the `batch_size`|You have overridden `transfer_batch_to_device`|your dataloader is not resumable|"
        "is smaller than the logging interval|using `DistributedSampler` with the dataloaders"
    )
    warnings.filterwarnings("ignore", message=f".*({texts})")
