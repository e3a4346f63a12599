"""``hydra/launcher=ray``: the jobs of a sweep as Ray tasks, on this machine or on a cluster.

Hydra's own Ray plugin (1.2.2) needs cloudpickle below 3. Imports here are light: Hydra loads this at every start.
"""

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus, configure_log, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from tercet.app.hydra_compat import process_state, run_worker_job
from tercet.app.sweeps import SAVE_SECONDS
from tercet.errors import import_extra, require
from tercet.paths import write_text

STORE_BYTES = 80 * 2**20  # a job is a configuration, its result a number; Ray's minimum is 75 MiB
ENVIRONMENT = {
    "RAY_DEDUP_LOGS": "0",  # all that the jobs print
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_COLOR_PREFIX": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # a job without a GPU sees none, in every version of Ray
}


class RayLauncher(Launcher):
    """Run as many jobs at once as ``cpus`` and ``gpus`` of each allow; a job whose process dies leaves ``error.txt``."""

    def __init__(self, address: str, cpus: float, gpus: float | None, runtime_env: dict[str, Any]) -> None:
        self.address, self.cpus, self.gpus, self.runtime_env = address, cpus, gpus, runtime_env

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take the configuration and import Ray, before anything is written (Hydra calls it)."""
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        self.ray: Any = import_extra("ray", "ray")
        self.context: Any = hydra_context
        self.task, self.cfg = task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs and return their results in the same order; Ctrl-C and SIGTERM stop all of them."""
        setup_globals()
        configure_log(self.cfg.hydra.hydra_logging, self.cfg.hydra.verbose)
        jobs = [self._compose(list(overrides), number) for number, overrides in enumerate(job_overrides, initial_job_idx)]
        local = {"include_dashboard": False, "object_store_memory": STORE_BYTES} if self.address == "local" else {}
        handler = signal.getsignal(signal.SIGTERM)
        self.ray.init(address=self.address, runtime_env=self.runtime_env, logging_level="error", **local)
        try:
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # Ray's handler prints a stack and aborts
            return self._run(jobs)
        except SystemExit:  # Ray has changed its code
            raise SystemExit(143) from None
        finally:
            time.sleep(0.5)  # for the last output of the jobs to arrive
            self.ray.shutdown()
            signal.signal(signal.SIGTERM, handler)

    def _compose(self, overrides: list[str], number: int) -> DictConfig:
        config: DictConfig = self.context.config_loader.load_sweep_config(self.cfg, overrides)
        with open_dict(config):
            config.hydra.job.id, config.hydra.job.num = f"{config.hydra.job.name}_{number}", number
        return config

    def _run(self, jobs: list[DictConfig]) -> list[JobReturn]:
        resources = {"num_cpus": self.cpus, "num_gpus": self._gpus_per_job()}
        task = self.ray.remote(max_retries=0, **resources)(run_task)  # its settings may be why a job died: no second try
        shared = self.ray.put((process_state(), self.context, self.task, os.getcwd()))
        refs = {task.options(name=f"job {job.hydra.job.num}").remote(job, shared): job for job in jobs}
        running, results = list(refs), {}
        try:
            while running:
                (ref,), running = self.ray.wait(running)
                try:
                    results[ref] = self.ray.get(ref)
                except self.ray.exceptions.RayError as error:
                    results[ref] = lost_job_result(refs[ref], error)
        except BaseException:
            for ref in refs:  # no effect on finished ones
                self.ray.cancel(ref)
            self.ray.wait(list(refs), num_returns=len(refs), timeout=SAVE_SECONDS)
            raise
        return [results[ref] for ref in refs]

    def _gpus_per_job(self) -> float:
        available = self.ray.cluster_resources()
        gpus = min(1, available.get("GPU", 0)) if self.gpus is None else self.gpus
        for key, wanted, name in (("cpus", self.cpus, "CPU"), ("gpus", gpus, "GPU")):
            there = available.get(name, 0)  # of a local Ray, which would wait for more for ever
            message = f"hydra.launcher.{key}={wanted} for each job, but there are {there:g} here."
            require(self.address != "local" or wanted <= there, message)
        return gpus


def run_task(job: DictConfig, shared: tuple[Any, HydraContext, TaskFunction, str]) -> JobReturn:
    """Run one job in a worker process of Ray, in the working directory of the sweep."""
    state, context, task, folder = shared
    require(Path(folder).is_dir(), f"{folder} is not on {os.uname().nodename}: a cluster's machines share a sweep's folder.")
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Ray cancels with it; jobs in the background ignore it
    return run_worker_job(job, state, context, task)


def lost_job_result(job: DictConfig, error: Exception) -> JobReturn:
    """The result (NaN) of a job that raised outside its task or whose process died; writes its ``error.txt``."""
    from tercet.app.error_formatting import explain

    number, folder = job.hydra.job.num, Path(job.hydra.sweep.dir, str(job.hydra.sweep.subdir))
    why = f"job {number} was ended from outside ({type(error).__name__}: often there was too little memory). {folder} holds "
    why += f"what was saved; the sweep's command with hydra.sweep.dir={folder.parent} resume=true goes on."
    if cause := getattr(error, "cause", None):  # an exception of the worker
        why = f"job {number}: {explain(cause, 'train')}"
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "error.txt", why + "\n")
    print(f"\nerror: {why}", file=sys.stderr, flush=True)
    result = JobReturn(overrides=list(job.hydra.overrides.task), status=JobStatus.COMPLETED)
    result.return_value = float("nan")
    return result
