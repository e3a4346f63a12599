"""The way in: Hydra composes, the command runs, and what goes wrong becomes one message and exit code 1.

Imports here are light: ``--help`` and a mistyped key are answered before torch is loaded.
"""

import importlib
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from tercet.app import error_formatting
from tercet.app.launch import run_id
from tercet.app.sweeps import summary

COMMANDS = {
    "compare": "runs as one table: compare <folders> metric=<name> output=<folder>",
    "train": "train, measured before and after (the same as train.py)",
    "evaluate": "measure any model: model=<run, checkpoint, folder or hub id> evaluation=sts output=<file.json>",
    "expand": "give a model of words those of larger vectors: model=<run> vectors=<file> output=<folder>",
    "export": "one ONNX file of a model: model=<as above> output=<folder> precision=int8",
    "mine": "write hard negatives: model=<as above> data.path=<pairs or labelled texts> output=<file.parquet>",
}


def config_folder() -> str:
    """The folder of the configuration: inside the installed package, or beside ``src`` in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "conf"
    return str(inside if inside.is_dir() else package.parents[1] / "conf")


def main(command: str) -> None:
    """Run a command of ``COMMANDS`` with the overrides in ``sys.argv``; leaves with 1 on a mistake, 130 on Ctrl-C."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come back to us as they are
    OmegaConf.register_new_resolver("run_id", run_id, use_cache=True, replace=True)
    arguments = sys.argv[1:]
    if command == "compare":
        folders = [a for a in arguments if "=" not in a and not a.startswith("-")]
        rest = [a for a in arguments if a not in folders]
        sys.argv[1:] = [*([f"runs=[{','.join(map(_quoted, folders))}]"] if folders else []), *rest]
    elif command != "train":
        sys.argv[1:] = [_model_is_a_path(argument) for argument in arguments]
    failed: list[str] = []
    job = hydra.main(version_base="1.3", config_path=config_folder(), config_name=command)(_job(command, failed))
    try:
        job()
    except KeyboardInterrupt:
        exit_stopped()
    except SystemExit as error:  # what Lightning makes of SIGTERM, and of Ctrl-C
        if type(error).__name__ == "SIGTERMException" or error.code == 143:
            exit_stopped(143)
        if isinstance(error.__context__, KeyboardInterrupt):
            exit_stopped()
        raise
    except Exception as error:
        report_error(error, config_folder(), command)
        raise SystemExit(1) from None
    raise SystemExit(1 if failed else 0)


def exit_stopped(code: int = 130) -> NoReturn:
    """The end after Ctrl-C, or after SIGTERM (143): not 0, which a scheduler would take for finished."""
    print("\nstopped; checkpoints/last.ckpt of the run holds the last weights, if training had begun", file=sys.stderr)
    raise SystemExit(code)


def _model_is_a_path(argument: str) -> str:
    # `model` is a group of conf/, so Hydra would look for conf/model/<path>.yaml; quotes keep `=` and spaces in it.
    name, equals, value = argument.partition("=")
    if name != "model" or not equals:
        return argument
    if value.startswith("[") and value.endswith("]"):
        return f"model.path=[{','.join(map(_quoted, value[1:-1].split(',')))}]"
    return f"model.path={_quoted(value)}"


def _quoted(value: str) -> str:
    escaped = value.strip().strip("'\"").replace("'", "\\'")
    return f"'{escaped}'"


def _job(command: str, failed: list[str]) -> Callable[[DictConfig], Any]:
    def job(cfg: DictConfig) -> Any:
        module = "stages" if command == "train" and cfg.stages.runs else command
        run: Callable[[DictConfig, Path], Any] = importlib.import_module(f"tercet.app.commands.{module}").run
        output = Path(HydraConfig.get().runtime.output_dir)
        if command == "train" and int(os.environ.get("SLURM_RESTART_COUNT", 0)):
            cfg.resume = True  # SLURM has queued the job again
        try:
            return run(cfg, output)
        except Exception as error:
            text = report_error(error, config_folder(), command)
            failed.append(text)
            if HydraConfig.get().mode == RunMode.MULTIRUN:  # the sweep goes on, its summary points here
                (output / "error.txt").write_text(text + "\n", encoding="utf-8")
            return float("nan")
        except (KeyboardInterrupt, SystemExit):
            summary.exit_stopped_job()
            raise

    return job


def report_error(error: Exception, conf_dir: str, command: str) -> str:
    """Print what the user can do about the error; ``TERCET_DEBUG=1`` adds where it came from."""
    text = error_formatting.explain(error, conf_dir, command)
    if os.environ.get("TERCET_DEBUG"):
        traceback.print_exception(error)
    print(f"\nerror: {text}", file=sys.stderr, flush=True)  # a new line: a progress bar may stand on this one
    return text
