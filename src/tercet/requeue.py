"""SLURM's word that it will take the machine away: the run is saved, and its job queued again."""

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from pytorch_lightning.utilities.exceptions import SIGTERMException

from tercet.console import say


@contextmanager
def requeued() -> Iterator[None]:
    """SIGUSR1 stops the run inside as SIGTERM does; once it is saved, SLURM queues the job again.

    SLURM sends it where the job asks for it: ``sbatch --requeue --signal=USR1@120``. Elsewhere nothing is changed.
    """
    if "SLURM_JOB_ID" not in os.environ or threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:  # nothing trains: there is nothing to save
            raise SIGTERMException
        signal.raise_signal(signal.SIGTERM)

    before = signal.signal(signal.SIGUSR1, stop)
    try:
        yield
    except SIGTERMException:
        before = signal.SIG_IGN  # it may come to this process after the others have agreed to stop
        if asked and os.environ.get("SLURM_PROCID", "0") == os.environ.get("RANK", "0") == "0":
            _queue_again()
        raise
    finally:
        signal.signal(signal.SIGUSR1, before)


def _queue_again() -> None:
    job = os.environ["SLURM_JOB_ID"]
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
        say(f"SLURM has been asked to queue job {job} again; it will go on.")
    except (OSError, subprocess.CalledProcessError) as error:
        why = str(getattr(error, "stderr", "") or error).strip()
        say(f"scontrol requeue {job}: {why}. The same command with resume=true goes on.")
