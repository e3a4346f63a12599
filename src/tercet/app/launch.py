"""One process per device of this machine."""

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from tercet.app import components, signals
from tercet.app.run_files import ERROR
from tercet.app.run_folder import write_failure
from tercet.distributed.processes import block_signals, end_with_parent, start_processes
from tercet.errors import InputError, require
from tercet.messages import print_status

Worker = Callable[[dict[str, Any], str], float | None]

START_METHOD = "spawn"  # a forked process could not use CUDA where this one has
SAVE_SECONDS = 50  # for stopped processes to write their checkpoint
LOOPBACK = "127.0.0.1"


def started_by_launcher() -> bool:
    """Whether torchrun or srun started this process as one of several."""
    return "LOCAL_RANK" in os.environ or ("SLURM_LOCALID" in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1)


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


def set_precision(cfg: DictConfig) -> None:
    """Replace ``trainer.precision=auto``: bf16-mixed on a GPU that computes in bf16 itself, else 32-true."""
    if cfg.trainer.precision == "auto":
        on_gpu = cfg.trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
        in_bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        cfg.trainer.precision = "bf16-mixed" if in_bf16 else "32-true"


def num_devices(cfg: DictConfig) -> int:
    """The number of devices of this machine that the trainer uses, whatever its strategy."""
    devices = cfg.trainer.devices
    if OmegaConf.is_list(devices):
        return len(devices)
    return int(devices) if str(devices).isdigit() and int(devices) else max(1, torch.cuda.device_count())


def launch_processes(worker: Worker, cfg: DictConfig, output: Path) -> float | None:
    """Run ``worker`` in every process; when one fails the others are ended, and its message is raised.

    A signal to this process, or to the whole group, is passed on as SIGTERM once: all save after the same step.
    """
    count = num_processes(cfg)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    print_status(f"{count} processes on this machine")
    listener = socket.create_server((LOOPBACK, 0))
    port = listener.getsockname()[1]
    store = TCPStore(LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    context: Any = multiprocessing.get_context(START_METHOD)
    results = context.SimpleQueue()
    configs = [OmegaConf.to_container(config) for config in (cfg, components.raw_config())]
    shared = (count, port, worker, *configs, str(output), results)
    processes = [context.Process(target=_run_rank, args=(rank, *shared)) for rank in range(count)]
    try:
        start_processes(processes)
        codes = _wait(processes)
    finally:
        _end(processes)
        del store
    if codes:
        _raise_failure(codes, count, output)
    return cast(float | None, results.get())


def _wait(processes: Sequence[BaseProcess]) -> dict[int, int]:
    """Wait until all processes have ended or one has failed; returns the exit codes of those that have failed."""
    running: dict[Any, BaseProcess] = {process.sentinel: process for process in processes}
    while running:
        for sentinel in wait(list(running)):
            running.pop(sentinel).join()
        if codes := {rank: process.exitcode for rank, process in enumerate(processes) if process.exitcode}:
            return codes
    return {}


def _end(processes: Sequence[BaseProcess]) -> None:
    """Let the processes that run save after their step, and kill those that have not after ``SAVE_SECONDS``."""
    with block_signals():  # one that comes again must not cut this short
        running = [process for process in processes if process.is_alive()]
        for process in running:
            process.terminate()
        end = time.monotonic() + SAVE_SECONDS
        for process in running:
            process.join(max(0.0, end - time.monotonic()))
            process.kill()
            process.join()


def _raise_failure(codes: dict[int, int], count: int, output: Path) -> NoReturn:
    """Raise what the processes with these exit codes have ended of."""
    if signals.TERMINATED in codes.values():
        raise SIGTERMException
    for rank, code in codes.items():
        if code < 0:
            what = f"process {rank} of {count} was ended by {signal.Signals(-code).name}"
            why = "SIGKILL: often there was too little memory"
            saved = f"{output / 'checkpoints'} holds what was saved; the same command with resume=true goes on."
            raise InputError(f"{what} ({why}), and the others were stopped. {saved}")
    if (output / ERROR).is_file():
        raise InputError((output / ERROR).read_text(encoding="utf-8").strip())
    rank, code = next(iter(codes.items()))
    raise InputError(f"process {rank} of {count} ended with exit code {code}.")


def _run_rank(
    rank: int, count: int, port: int, worker: Worker, config: dict[str, Any], raw: Any, output: str, results: Any
) -> None:
    """Run the worker as one of ``count`` processes; write its error message to the run folder before it fails."""
    end_with_parent()
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "tercet", "TORCHELASTIC_USE_AGENT_STORE": "True",  # as torchrun: the store is in the parent
    }  # fmt: skip
    if sys.platform == "linux":
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
    components.start_record(OmegaConf.create(raw))
    with signals.exit_at_once():
        try:
            with signals.stop_on_signals():
                value = worker(config, output)
        except SIGTERMException:
            raise SystemExit(signals.TERMINATED) from None
        except Exception as error:
            write_failure(Path(output), error)
            if os.environ.get("TERCET_DEBUG"):
                raise
            raise SystemExit(1) from None
        if rank == 0:
            results.put(value)
        raise SystemExit(0)
