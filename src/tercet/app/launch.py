"""One process per device, and SLURM's signal to requeue a job."""

import logging
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tercet.app import components
from tercet.app.error_formatting import explain
from tercet.errors import InputError, require
from tercet.messages import print_status

Worker = Callable[[dict[str, Any], str], float | None]


def started_by_launcher() -> bool:
    """Whether torchrun or srun started this process as one of several."""
    return "LOCAL_RANK" in os.environ or ("SLURM_LOCALID" in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1)


def is_first_on_node() -> bool:
    """Whether this is the first process on its node."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0))) == 0


def num_processes(cfg: DictConfig) -> int:
    """The number of processes on this machine, from the trainer's strategy and devices."""
    nodes = cfg.trainer.num_nodes
    advice = "Start train.py by torchrun or srun on each, with the same RUN_ID; conf/trainer/multi_node.yaml shows the command."
    require(nodes <= 1, f"trainer.num_nodes={nodes}: several nodes need a launcher. {advice}")
    return num_devices(cfg) if str(cfg.trainer.strategy).startswith(("ddp", "fsdp", "deepspeed")) else 1


def needs_processes(cfg: DictConfig) -> bool:
    """Whether to start processes: also one alone, where weights are sharded, since Lightning would listen on all networks."""
    return num_processes(cfg) > 1 or str(cfg.trainer.strategy).startswith(("fsdp", "deepspeed"))


def strategy_options(cfg: DictConfig) -> dict[str, Any]:
    """What replaces settings of the trainer: ``ddp`` for one process alone, which needs no connections to others."""
    alone = not started_by_launcher() and str(cfg.trainer.strategy).startswith("ddp")
    return {"strategy": "auto"} if alone else {}


def num_devices(cfg: DictConfig) -> int:
    """The number of devices of this machine that the trainer uses, whatever its strategy."""
    devices = cfg.trainer.devices
    if OmegaConf.is_list(devices):
        return len(devices)
    return int(devices) if str(devices).isdigit() and int(devices) else max(1, torch.cuda.device_count())


def launch_processes(worker: Worker, cfg: DictConfig, output: Path) -> float | None:
    """Run ``worker`` in every process; when one fails the others are ended, and its message is raised."""
    count = num_processes(cfg)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    plan = LaunchConfig(1, 1, count, run_id=output.name, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0)
    print_status(f"{count} processes on this machine")
    if not os.environ.get("TERCET_DEBUG"):  # the launcher logs the traceback of a failure, which is raised below
        for name in ("", ".agent.server.api", ".multiprocessing.api"):
            logging.getLogger(f"torch.distributed.elastic{name}").setLevel(logging.CRITICAL)
    config, raw = OmegaConf.to_container(cfg), OmegaConf.to_container(components.raw_config())
    (output / "error.txt").unlink(missing_ok=True)
    try:
        with restored_signals():
            results: dict[int, float | None] = elastic_launch(plan, _reported)(worker, config, str(output), raw)
    except SignalException as error:  # the processes have received it, too, and have saved
        raise (KeyboardInterrupt if error.sigval == signal.SIGINT else SIGTERMException) from None
    except ChildFailedError as error:
        for rank, failure in sorted(error.failures.items()):
            if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:  # SIGTERM is what the others get
                what = f"process {rank} of {count} was ended by {signal.Signals(-failure.exitcode).name}"
                why = "SIGKILL: often there was too little memory"
                saved = f"{output / 'checkpoints'} holds what was saved; the same command with resume=true goes on."
                raise InputError(f"{what} ({why}), and the others were stopped. {saved}") from None
        if (output / "error.txt").is_file():
            raise InputError((output / "error.txt").read_text(encoding="utf-8").strip()) from None
        rank, failure = error.get_first_failure()
        raise InputError(f"process {rank} of {count} ended with exit code {failure.exitcode}: {failure.message}") from error
    return results[0]


@contextmanager
def restored_signals() -> Iterator[None]:
    """Put the signal handlers back at the end: torch's launcher leaves its own behind.

    A handler that was installed from C is None in Python and cannot be put back.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                if handler is not None:
                    signal.signal(number, handler)


def _reported(worker: Worker, config: dict[str, Any], output: str, raw: Any) -> float | None:
    """Run the worker; write its error message to the run folder before it fails."""
    components.start_record(OmegaConf.create(raw))
    if "SLURM_JOB_ID" in os.environ:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # the process that started this one passes it on
    try:
        return worker(config, output)
    except Exception as error:
        # The first to fail knows why; the others only miss it.
        with suppress(OSError), (Path(output) / "error.txt").open("x", encoding="utf-8") as file:
            file.write(explain(error, "train") + "\n")
        if os.environ.get("TERCET_DEBUG"):
            raise
        raise SystemExit(1) from None


@contextmanager
def requeue_on_signal() -> Iterator[None]:
    """Stop the run inside at SLURM's SIGUSR1 (``sbatch --requeue --signal=USR1@120``) as SIGTERM does, then requeue the job."""
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
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
        print_status(f"SLURM queues job {job} again; it will be resumed.")
    except (OSError, subprocess.CalledProcessError) as error:
        why = str(getattr(error, "stderr", "") or error).strip()
        print_status(f"scontrol requeue {job}: {why}. The same command with resume=true continues the run.")
