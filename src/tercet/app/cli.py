"""The command line: Hydra composes the configuration, the command runs, and any error becomes one message and exit code 1.

Imports here are light: ``--help`` and a mistyped key are answered before torch is loaded.
"""

import argparse
import importlib
import os
import secrets
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from tercet.app import components, error_formatting, hydra_compat, signals, sweeps
from tercet.app import config_folder as config_folder
from tercet.app.run_files import ERROR
from tercet.errors import refuse_arguments, require
from tercet.messages import printable, silence_libraries
from tercet.paths import RENAME_MANY, is_utf8, remove_empty, write_text

COMMANDS = {
    "compare": "runs as one table: compare <folders> metric=<name> output=<folder>; models by example: compare a.json b.json",
    "train": "train, measured before and after (the same as train.py)",
    "encode": "vectors of texts or images: model=<as above> data.path=<texts> output=<file.npy, file.parquet or folder>",
    "search": "index vectors: vectors=<file> output=<folder> kind=hnsw; ask: index=<folder> query=<text or file>",
    "evaluate": "measure any model: model=<run, checkpoint, folder or hub id> evaluation=sts output=<file.json>",
    "expand": "give a model of words those of larger vectors: model=<run> vectors=<file> output=<folder>",
    "export": "a model for ONNX, OpenVINO or torch.export: model=<as above> output=<folder> precision=int8",
    "push": "send a model to the Hugging Face Hub: model=<run, folder or export> repo=<user>/<name>",
    "app": "a page of texts as a model sees them: model=<as above> other=<model before> data=table data.path=<texts>",
    "runs": "list, best metric=<name>, show RUN, diff RUN RUN, tail RUN, prune: the runs below outputs/",
    "serve": "OpenAI's /v1/embeddings, search and metrics: model=<as above> index=<folder> port=8000",
    "mine": "write hard negatives: model=<as above> data.path=<pairs or labeled texts> output=<file.parquet>",
    "doctor": "whether training can start here, and what is missing: --json --online",
    "completion": "the script that completes commands, keys and choices in bash, zsh or fish: completion bash",
}
TASKS = {  # how `tercet --help` groups the commands
    "train": ("train", "mine"),
    "measure": ("evaluate", "compare"),
    "use": ("encode", "search", "serve", "export", "expand"),
    "look": ("app", "runs"),
    "publish": ("push",),
    "set up": ("doctor", "completion"),
}

POSITIONAL = {"compare": "runs", "runs": "words"}  # the key that arguments without a key are given to
WRITING = ("evaluate", "expand", "export", "mine", "search")  # when all is done
SWITCHES = {"runs": {"--yes": "delete what prune has shown"}, "push": {"--dry-run": "show the files, send nothing"}}


def help_by_task() -> str:
    """What ``tercet --help`` prints: the commands by what they are for."""
    lines = ["usage: tercet COMMAND [key=value ...]"]
    for task, names in TASKS.items():
        lines += ["", task, *(f"  {name:11}{COMMANDS[name]}" for name in names)]
    return "\n".join([*lines, "", "`tercet COMMAND --help` has the keys of a command, `tercet --version` the version."])


def run_id() -> str:
    """``RUN_ID``, else SLURM's job and step, else what the first process of torchrun chose, else the time and four digits."""
    if value := os.environ.get("RUN_ID"):
        return value
    if int(os.environ.get("SLURM_NTASKS", 1)) > 1:
        return "-".join(os.environ[name] for name in ("SLURM_JOB_ID", "SLURM_STEP_ID") if name in os.environ)
    fresh = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    if not os.environ.get("TORCHELASTIC_RUN_ID"):
        return fresh
    # Started by torchrun: the processes share its store and nothing else yet.
    from torch.distributed.rendezvous import rendezvous

    store, rank, _ = next(rendezvous("env://"))
    if rank == 0:
        store.set("tercet/run_id", fresh)
    return str(store.get("tercet/run_id").decode())


def main(command: str, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command of ``COMMANDS`` with its overrides; exits with 1 on an error, 130 on Ctrl-C, 143 on SIGTERM."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come back to us as they are
    # Read when torch is loaded. By default the threads of a step spin for each other, many times slower on a busy machine, and
    # each step asks for its memory anew, page by page (on Linux). They spin for a moment still, since waking one takes longer.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    OmegaConf.register_new_resolver("run_id", run_id, use_cache=True, replace=True)
    given = list(sys.argv[1:] if arguments is None else arguments)
    if command == "train" and "data=text" in given and not any(o.lstrip("+~").split("=")[0] == "experiment" for o in given):
        given.insert(given.index("data=text"), "experiment=own_texts")  # the quickstart's 50 steps would not fit other data
    failed: list[str] = []
    signals.describe_stop(None)
    if command == "train" and {"-m", "--multirun"} & {*given}:
        go_on = "The same command with the same hydra.sweep.dir and resume=true continues."
        signals.describe_stop(lambda: f"; finished jobs and checkpoints are kept. {go_on}")
    with signals.stop_on_signals(), signals.exit_at_once():
        try:
            _check_letters(given)
            if command == "train":
                hydra_compat.run_main(_job(failed), config_folder(), command, given)
            else:
                _run_composed(command, given)
        except KeyboardInterrupt:
            signals.exit_stopped(signals.INTERRUPTED, command)
        except SystemExit as error:  # what Lightning makes of Ctrl-C, and GracefulStop of SIGTERM
            if isinstance(error.__context__, KeyboardInterrupt):
                signals.exit_stopped(signals.INTERRUPTED, command)
            if type(error).__name__ == "SIGTERMException" or error.code == signals.TERMINATED:
                signals.exit_stopped(signals.TERMINATED, command)
            raise
        except Exception as error:
            report_error(error, command)
            raise SystemExit(1) from None
        raise SystemExit(1 if failed else 0)


def _check_letters(arguments: Sequence[str]) -> None:
    """Raise ``InputError`` for an argument that is not UTF-8, or typed in a folder whose name is not: no file can record it."""
    for text in (*arguments, str(Path.cwd())):
        require(is_utf8(text), f"{os.fsencode(text)!r} is not UTF-8. Rename the file or folder {RENAME_MANY}.")


def _run_composed(command: str, arguments: Sequence[str]) -> None:
    """Run a command that has no sweeps and no run folder, by Hydra's compose API."""
    lines = Path(config_folder(), f"{command}.yaml").read_text(encoding="utf-8").splitlines()
    parser = argparse.ArgumentParser(
        prog=f"tercet {command}", formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        description="\n".join(line.removeprefix("# ") for line in lines), usage=f"tercet {command} [key=value ...]",
    )  # fmt: skip
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument("--cfg", choices=["job"], help="print the configuration instead of running")
    parser.add_argument("--config-dir", help="a folder with more choices of the configuration groups")
    for switch, text in SWITCHES.get(command, {}).items():  # --dry-run is dry_run=true
        override = f"{switch[2:].replace('-', '_')}=true"
        parser.add_argument(switch, action="append_const", dest="switches", const=override, help=text)
    parser.error = refuse_arguments  # type: ignore[method-assign]
    options = parser.parse_intermixed_args(list(arguments))
    words = _without_key(options.overrides, command) if command in POSITIONAL else []
    overrides = [_quote_value(a) for a in options.overrides if a not in words] + (getattr(options, "switches", None) or [])
    overrides += [f"{POSITIONAL[command]}={hydra_compat.quote(_unquoted(words))}"] if words else []
    if options.config_dir:
        overrides.append(f"hydra.searchpath={hydra_compat.quote([str(Path(options.config_dir).resolve())])}")
    with initialize_config_dir(config_folder(), version_base="1.3", job_name=command):
        cfg = compose(command, overrides)
        if options.cfg:
            print(OmegaConf.to_yaml(cfg), end="")
            return
        components.start_record(cfg)
        components.check_settings(cfg)
        if command in WRITING:
            signals.describe_stop(_watch_output(cfg.output))
        name, function = ("export", "expand") if command == "expand" else (command, "run")
        try:
            module = importlib.import_module(f"tercet.app.commands.{name}")
            silence_libraries()  # after they are imported: they set the levels of their loggers then
            getattr(module, function)(cfg, Path.cwd())
        finally:
            if "output" in cfg and cfg.output:
                remove_empty(Path(cfg.output), Path.cwd())


def _watch_output(output: str | None) -> Callable[[], str]:
    """What to say at a stop: whether the command has begun to write ``output``."""

    def written() -> int | None:
        return Path(output).stat().st_mtime_ns if output and Path(output).exists() else None

    before = written()
    return lambda: "; nothing was written" if written() == before else f"; {output} may be incomplete: start the command again"


def _without_key(arguments: Sequence[str], command: str) -> list[str]:
    """The arguments that name no key, as folders: also one whose name holds a `=`, if it is there and no key of its own."""
    keys = OmegaConf.load(Path(config_folder(), f"{command}.yaml"))
    return [a for a in arguments if "=" not in a or (Path(a).is_dir() and a.split("=")[0] not in keys)]


def _quote_value(override: str) -> str:
    # `model` is also a group of conf/, of which Hydra would look for a choice; quotes keep `=` and spaces in a path or a query.
    if override.startswith("query="):
        return f"query={hydra_compat.quote(override.removeprefix('query='))}"
    if not override.startswith("model="):
        return override
    value = override.removeprefix("model=")
    several = value.startswith("[") and value.endswith("]")
    return f"model.path={hydra_compat.quote(_unquoted(value[1:-1].split(',')) if several else _unquoted([value])[0])}"


def _unquoted(values: Sequence[str]) -> list[str]:
    return [value.strip().strip("'\"") for value in values]


def _job(failed: list[str]) -> Callable[[DictConfig], Any]:
    def job(cfg: DictConfig) -> Any:
        output = Path(HydraConfig.get().runtime.output_dir)
        try:
            with signals.stop_on_signals():  # in a worker process of a sweep, which has not come by `main`
                components.start_record(cfg)
                components.check_settings(cfg)
                moved = "paths would start in the folder of the run, not where the command was typed. Leave it out"
                require(not HydraConfig.get().job.chdir, f"hydra.job.chdir=true: {moved}.")
                module = importlib.import_module(f"tercet.app.commands.{'stages' if cfg.stages.runs else 'train'}")
                if int(os.environ.get("SLURM_RESTART_COUNT", 0)):
                    cfg.resume = True  # SLURM has queued the job again
                return module.run(cfg, output)
        except Exception as error:
            failed.append(report_error(error, "train"))
            if HydraConfig.get().mode == RunMode.MULTIRUN:  # the sweep goes on, its summary points here
                with suppress(OSError):  # a full disk may be the error
                    write_text(output / ERROR, failed[-1] + "\n")
            return float("nan")
        except (KeyboardInterrupt, SystemExit):
            remove_empty(output, Path.cwd())
            sweeps.end_stopped_job()
            raise
        finally:
            remove_empty(output, Path.cwd())  # of a run that has written nothing

    return job


def report_error(error: Exception, command: str) -> str:
    """Print what the user can do about the error; ``TERCET_DEBUG=1`` adds the traceback."""
    text = printable(error_formatting.explain(error, command))
    if os.environ.get("TERCET_DEBUG"):
        print(printable("".join(traceback.format_exception(error))), file=sys.stderr)
    print(f"\nerror: {text}", file=sys.stderr, flush=True)  # a new line: a progress bar may stand on this one
    return text
