"""Messages to the user: status lines, and warnings that are printed once."""

import logging
import math
import re
import statistics
import sys
import time
import warnings
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

_reported: set[str] = set()
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\t\n]")


def printable(text: str, lines: bool = True) -> str:
    r"""The text with the characters that steer a terminal, or cannot be encoded, as escapes; without ``lines`` on one line.

    >>> printable("a \x1b[2J\nb"), printable("a\nb", lines=False)
    ('a \\x1b[2J\nb', 'a\\nb')
    """
    return _CONTROL.sub(lambda x: x[0] if lines and x[0] in "\t\n" else x[0].encode("unicode_escape").decode(), text)


def csv_cell(cell: Any) -> Any:
    """The cell of a table for people: before text that a spreadsheet would take for a formula stands a quote.

    >>> [csv_cell(cell) for cell in ("=1+1", "a=1", "-0.5", "- he said", 2.5)]
    ["'=1+1", 'a=1', '-0.5', "'- he said", 2.5]
    """
    number = r"[+-]?[\d.]+(e[+-]?\d+)?"
    is_formula = isinstance(cell, str) and re.match(r"[=+\-@\t\r\n＝＋－＠].", cell) and not re.fullmatch(number, cell)
    return f"'{cell}" if is_formula else cell


def markdown_text(text: str) -> str:
    r"""The text on one line, without any of Markdown's meanings.

    >>> markdown_text("a | <b>")
    'a \\| \\<b\\>'
    """
    return re.sub(r"([\\`*_\[\]<>|#~&!$])", r"\\\1", " ".join(printable(text).split()))


def sample_sd(values: Collection[float]) -> float:
    """The standard deviation (n - 1); NaN for fewer than two values, and where one is infinite (a perplexity) or NaN.

    >>> sample_sd([1.0, 2.0, 3.0]), sample_sd([math.inf, 1.0])
    (1.0, nan)
    """
    return statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else math.nan


def format_mean_sd(values: Collection[float]) -> str:
    """``mean ± standard deviation``; the mean alone for one value, and where one is infinite or NaN.

    >>> format_mean_sd([1.0, 2.0, 3.0]), format_mean_sd([0.5]), format_mean_sd([math.inf, 1.0])
    ('2.0000 ± 1.0000', '0.5000', 'inf')
    """
    mean, sd = statistics.fmean(values), sample_sd(values)
    return f"{mean:.4f}" + (f" ± {sd:.4f}" if math.isfinite(sd) else "")


@cache
def warn_once(message: str) -> None:
    """Log a warning; the same message is logged once in a process."""
    logging.getLogger("tercet").warning(printable(message))


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
            warn_once(f"{what}: {type(error).__name__}: {error}; the run goes on without it.")


def print_status(line: str) -> None:
    """Print one line to stderr, from the first process only."""
    from tercet.distributed.gather import rank  # imports torch, which this module does not need otherwise

    if rank() == 0:
        print(printable(line), file=sys.stderr, flush=True)


class ProgressLines(AbstractContextManager["ProgressLines"]):
    """Progress where the output is no terminal: one line every few ``seconds`` in place of a bar.

    ``total`` may be infinite; ``done`` of it were made before, by a run that is resumed.
    """

    def __init__(self, what: str, total: float, unit: str, seconds: float = 5.0, done: int = 0) -> None:
        self.what, self.total, self.unit, self.seconds = what, total, unit, seconds
        self.n = self.first = done
        self.start = time.monotonic()
        self.due = self.start + seconds

    def update(self, done: int, beside: str = "") -> None:
        """Count ``done`` more, and print a line if one is due; ``beside`` is added to it."""
        self.n += done
        now = time.monotonic()
        if now >= self.due:
            self.due = now + self.seconds
            known = math.isfinite(self.total)
            line = f"{self.what}{self.n}{f' of {self.total:.0f}' if known else ''}{self.unit}"
            if known and self.n > self.first:
                line += f", {(now - self.start) / (self.n - self.first) * (self.total - self.n) / 60:.1f} min left"
            print_status(line + beside)

    def __exit__(self, *_: object) -> None:
        """Nothing is left to close."""


def progress_bar(what: str, total: int, unit: str, done: int = 0, hidden: bool = False) -> "tqdm[Any] | ProgressLines":
    """A bar with the time that is left, in a terminal; lines where the output is none. ``done`` were made before."""
    from tqdm import tqdm

    if hidden or sys.stderr.isatty():
        return tqdm(total=total, initial=done, desc=what, unit=f" {unit}", disable=hidden, leave=False, mininterval=0.5)
    return ProgressLines(f"{what}: ", total, f" {unit}", done=done)


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Hide the bars of ``datasets``, which also writes them where the output is no terminal."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hidden = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not hidden:
            enable_progress_bars()


def silence_libraries() -> None:
    """Silence tips of libraries, and their warnings about choices that are made on purpose here."""
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric", "bm25s"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own: each line would stand there twice
    logging.basicConfig(format="%(message)s")  # counts of dropped rows
    texts = (
        "does not have many workers|directory .* exists and is not empty|It is recommended to use `self.log.*sync_dist=True|"
        "lr_scheduler.step|isinstance.treespec, LeafSpec|Total length of `DataLoader` across ranks is zero|tensorboardX|"
        "Trying to infer the `batch_size`|You have overridden `transfer_batch_to_device`|your dataloader is not resumable|"
        "is smaller than the logging interval|using `DistributedSampler` with the dataloaders"
    )
    warnings.filterwarnings("ignore", message=f".*({texts})")
