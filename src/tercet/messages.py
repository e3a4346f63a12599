"""Messages to the user: status lines, and warnings that are printed once."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from tercet.distributed.gather import rank

_failed: set[str] = set()


@cache
def warn_once(message: str) -> None:
    """Log a warning; rows are read and evaluators run many times, the same message is not repeated."""
    logging.getLogger("tercet").warning(message)


def describe_logger(logger: Any) -> str:
    """What is said of a logger: which it is, and where it writes."""
    return f"{type(logger).__name__} in {logger.save_dir}"


@contextmanager
def log_errors(what: str, kind: type[Exception] = OSError) -> Iterator[None]:
    """An error of this kind in here ends no run: the first of ``what`` is said, and it goes on."""
    try:
        yield
    except kind as error:
        if what not in _failed:
            _failed.add(what)
            logging.getLogger("tercet").warning(f"{what}: {type(error).__name__}: {error}; the run goes on without it.")


def print_status(line: str) -> None:
    """One line for the user, from the first process only."""
    if rank() == 0:
        print(line, file=sys.stderr, flush=True)


def silence_libraries() -> None:
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
