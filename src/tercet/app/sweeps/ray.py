"""``hydra/launcher=ray``: the jobs of a sweep as tasks of Ray, which places them where there is room.

Hydra's own plugin for Ray (1.2.2) asks for cloudpickle below 3. It stands here because Hydra takes launchers from this
package alone.
"""

import importlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, configure_log, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from tercet.app.sweeps.summary import SAVING
from tercet.errors import InputError

STORE = 80 * 2**20  # bytes, Ray's least is 75 MiB: a job is a configuration, its result a number


class RayLauncher(Launcher):
    """All jobs at once, as far as ``cpus`` and ``gpus`` of each go; a job whose process dies leaves ``error.txt``."""

    def __init__(self, address: str, cpus: float, gpus: float | None, runtime_env: dict[str, Any]) -> None:
        self.address, self.cpus, self.gpus, self.runtime_env = address, cpus, gpus, runtime_env
        self.cfg = DictConfig({})
        self.context: Any = None
        self.task: Any = None
        self.ray: Any = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """What Hydra hands over, before anything is written."""
        self.context, self.task, self.cfg, self.ray = hydra_context, task_function, config, import_ray()

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """The jobs' results in their order; Ctrl-C and SIGTERM stop all of them, as they would one."""
        setup_globals()
        configure_log(self.cfg.hydra.hydra_logging, self.cfg.hydra.verbose)
        jobs = [self._composed(list(job), initial_job_idx + i) for i, job in enumerate(job_overrides)]
        local = {"include_dashboard": False, "object_store_memory": STORE} if self.address == "local" else {}
        before = signal.getsignal(signal.SIGTERM)
        self.ray.init(address=self.address, runtime_env=self.runtime_env, logging_level="error", **local)
        try:
            signal.signal(signal.SIGTERM, _terminated)  # Ray's prints a stack and aborts
            return self._run(jobs)
        except SystemExit:  # Ray has put a code of its own in it
            raise SystemExit(143) from None
        finally:
            time.sleep(0.5)  # what the jobs print last is on its way
            self.ray.shutdown()
            signal.signal(signal.SIGTERM, before)

    def _composed(self, overrides: list[str], number: int) -> DictConfig:
        config: DictConfig = self.context.config_loader.load_sweep_config(self.cfg, overrides)
        with open_dict(config):
            config.hydra.job.id, config.hydra.job.num = f"{config.hydra.job.name}_{number}", number
        return config

    def _run(self, jobs: list[DictConfig]) -> list[JobReturn]:
        needs = {"num_cpus": self.cpus, "num_gpus": self._gpus()}
        # A job that died may have died of its settings: it is not tried again.
        task = self.ray.remote(max_retries=0, **needs)(execute)
        shared = self.ray.put((Singleton.get_state(), self.context, self.task, os.getcwd()))
        refs = {task.options(name=f"job {job.hydra.job.num}").remote(job, shared): job for job in jobs}
        waiting, results = list(refs), {}
        try:
            while waiting:
                (ref,), waiting = self.ray.wait(waiting)
                try:
                    results[ref] = self.ray.get(ref)
                except self.ray.exceptions.RayError as error:
                    results[ref] = lost_job_result(refs[ref], error)
        except BaseException:
            for ref in refs:  # to one that has ended this is nothing
                self.ray.cancel(ref)
            self.ray.wait(list(refs), num_returns=len(refs), timeout=SAVING)
            raise
        return [results[ref] for ref in refs]

    def _gpus(self) -> float:
        there = self.ray.cluster_resources()
        gpus = min(1, there.get("GPU", 0)) if self.gpus is None else self.gpus
        for key, asked, name in (("cpus", self.cpus, "CPU"), ("gpus", gpus, "GPU")):
            if self.address == "local" and asked > there.get(name, 0):  # Ray would wait for it for ever
                raise InputError(f"hydra.launcher.{key}={asked} for each job, but there are {there.get(name, 0):g} here.")
        return gpus


def import_ray() -> Any:
    """Ray, which is large and wanted by few; it repeats what the jobs print, all of it, and reports nothing home."""
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")  # a job of no GPU sees none, in every version
    try:
        return importlib.import_module("ray")
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is not installed: pip install 'tercet[ray]'.") from error


def execute(job: DictConfig, shared: tuple[Any, HydraContext, TaskFunction, str]) -> JobReturn:
    """One job, in a process of Ray's that knows nothing of the sweep yet."""
    state, context, task, folder = shared
    if not Path(folder).is_dir():
        raise InputError(f"{folder} is not on {os.uname().nodename}: a cluster's machines share the folder of a sweep.")
    os.chdir(folder)
    # Ray cancels by it; a sweep begun in the background hands down that it is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    setup_globals()
    Singleton.set_state(state)
    HydraConfig.instance().set_config(job)
    return run_job(
        hydra_context=context,
        task_function=task,
        config=job,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
    )


def lost_job_result(job: DictConfig, error: Exception) -> JobReturn:
    """What a job that could not return has for its result: no number, as where it failed by itself."""
    from tercet.app.error_formatting import explain

    number, folder = job.hydra.job.num, Path(job.hydra.sweep.dir, str(job.hydra.sweep.subdir))
    if cause := getattr(error, "cause", None):  # raised there
        why = f"job {number}: {explain(cause, '', 'train')}"
    else:
        why = (
            f"job {number} was ended from outside ({type(error).__name__}: often there was too little memory). "
            f"{folder} holds what was saved; the sweep's command with hydra.sweep.dir={folder.parent} resume=true goes on."
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "error.txt").write_text(why + "\n", encoding="utf-8")
    print(f"\nerror: {why}", file=sys.stderr, flush=True)
    result = JobReturn(overrides=list(job.hydra.overrides.task), status=JobStatus.COMPLETED)
    result.return_value = float("nan")
    return result


def _terminated(*_: object) -> None:
    raise SystemExit(143)
