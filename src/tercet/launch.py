"""One process per device: started once, here, and never nested. Under torchrun or srun they exist already."""

import contextlib
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tercet.console import say
from tercet.error import InputError
from tercet.mistakes import explain

Worker = Callable[[dict[str, Any], str], float | None]


def launched() -> bool:
    """Whether somebody else started this process as one of several."""
    return "LOCAL_RANK" in os.environ or ("SLURM_LOCALID" in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1)


def first_here() -> bool:
    """Whether this is the first process on its node."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0))) == 0


def processes(cfg: DictConfig) -> int:
    """How many processes the trainer asks for on this machine."""
    trainer = cfg.trainer
    if trainer.num_nodes > 1:
        raise InputError(
            f"trainer.num_nodes={trainer.num_nodes}: several nodes need a launcher. Start train.py by torchrun or srun on "
            "each of them, with the same RUN_ID; conf/trainer/multi_node.yaml shows the command."
        )
    if not isinstance(trainer.strategy, str) or not trainer.strategy.startswith(("ddp", "fsdp", "deepspeed")):
        return 1
    if isinstance(trainer.devices, int) and trainer.devices > 0:
        return int(trainer.devices)
    if OmegaConf.is_list(trainer.devices):
        return len(trainer.devices)
    return max(1, torch.cuda.device_count())


def launch(worker: Worker, cfg: DictConfig, output: Path) -> float | None:
    """Run ``worker`` in every process; when one dies the others are ended, and its message is the run's."""
    count = processes(cfg)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    plan = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=output.name,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="spawn",
    )
    say(f"{count} processes on this machine")
    if not os.environ.get("TERCET_DEBUG"):  # the launcher logs the traceback of a failure that is told below
        for name in ("", ".agent.server.api", ".multiprocessing.api"):
            logging.getLogger(f"torch.distributed.elastic{name}").setLevel(logging.CRITICAL)
    config = OmegaConf.to_container(cfg)
    (output / "error.txt").unlink(missing_ok=True)
    try:
        results = elastic_launch(plan, _reported)(worker, config, str(output))
    except SignalException as error:  # the processes have had it too, and saved where they were
        raise (KeyboardInterrupt if error.sigval == signal.SIGINT else SIGTERMException) from None
    except ChildFailedError as error:
        for rank, failure in sorted(error.failures.items()):
            if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:  # SIGTERM is what the others get
                name, saved = signal.Signals(-failure.exitcode).name, output / "checkpoints"
                raise InputError(
                    f"process {rank} of {count} was ended by {name} (SIGKILL: often there was too little memory), and the "
                    f"others were stopped. {saved} holds what was saved; the same command with resume=true goes on."
                ) from None
        message = output / "error.txt"
        if message.is_file():
            raise InputError(message.read_text(encoding="utf-8").strip()) from None
        rank, failure = error.get_first_failure()
        raise InputError(
            f"process {rank} of {count} ended with exit code {failure.exitcode}: {failure.message}"
        ) from error
    value: float | None = results[0]
    return value


def _reported(worker: Worker, config: dict[str, Any], output: str) -> float | None:
    """The worker, leaving its message in the run folder before it fails."""
    if "SLURM_JOB_ID" in os.environ:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # the process that started this one passes it on
    try:
        return worker(config, output)
    except Exception as error:
        # The first to fail knows why; the others only miss it.
        with contextlib.suppress(FileExistsError), (Path(output) / "error.txt").open("x", encoding="utf-8") as file:
            file.write(explain(error, "", "train") + "\n")
        if os.environ.get("TERCET_DEBUG"):
            raise
        raise SystemExit(1) from None
