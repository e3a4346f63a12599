"""Damaged inputs of every kind: each must be accepted, or refused by one message of Tercet's own and exit code 1.

    python -m benchmarks.fuzz --inputs 1000                       a random thousand, on one core
    python -m benchmarks.fuzz --inputs 10000 --seed 1 --kinds models checkpoints
    python -m benchmarks.fuzz --seed 1 --only 123                 one input again, with its output

The commands run as a user runs them, each in a process that is forked from a warm one, with limits of time and memory. Counted
are: unexplained exceptions, hangs, ends by a signal, wrong exit codes. The files, the command and the output of each are kept
in ``findings/`` beside the table, the file and the overrides made as small as they may be with the same end.
"""

import argparse
import faulthandler
import importlib
import os
import random
import re
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from huggingface_hub import constants
from hydra import compose, initialize_config_dir

from benchmarks.fuzz_inputs import KINDS, Case, make_materials, read_keys, training
from benchmarks.report import write
from benchmarks.turns import surroundings
from tercet.app import cli

FAULTS = ("unexplained", "hang", "signal", "wrong exit code")
UNEXPLAINED = "(TERCET_DEBUG=1 shows where)"
MEMORY = 4 << 30  # bytes of addresses that a command may take beyond those of the warm process
WAIT = 20  # times that limit, of the clock: a busy machine is no hang
TRIES = 30  # to make an input smaller


class End(NamedTuple):
    """How a command ended: ``fault`` is one of ``FAULTS``, "accepted" or "refused"; ``place`` is where an error was raised."""

    fault: str
    output: str
    place: str = ""


class Fuzzer:
    """Draws and runs inputs; ``place`` holds the good ones."""

    def __init__(self, seed: int, kinds: list[str], place: Path, limit: int) -> None:
        self.seed, self.kinds, self.place, self.limit = seed, kinds, place, limit
        self.size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()

    def draw(self, number: int, here: Path) -> tuple[str, Case]:
        """The kind and the input of a number; its files are written to ``here``."""
        chosen = random.Random(f"{self.seed}-{number}")
        kind = chosen.choices(self.kinds, [KINDS[name][1] for name in self.kinds])[0]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return kind, KINDS[kind][0](chosen, self.place, here)

    def run(self, case: Case, here: Path, debug: bool = False) -> End:
        """Run the command in a copy of ``here``, so that the input stays as it is."""
        with tempfile.TemporaryDirectory() as folder:
            work, log = Path(folder) / "work", Path(folder) / "log"
            shutil.copytree(here, work, symlinks=True)
            process = os.fork()
            if not process:
                self._child(case, work, log, debug)
            status = _wait(process, WAIT * self.limit)
            output = log.read_bytes().decode(errors="replace") if log.exists() else ""
        return classify(status, output)

    def _child(self, case: Case, work: Path, log: Path, debug: bool) -> None:
        code = 70
        try:
            os.setsid()
            for name, number, errors in (("stdout", 1, "strict"), ("stderr", 2, "backslashreplace")):
                setattr(sys, name, os.fdopen(number, "w", buffering=1, encoding="utf-8", errors=errors))
            handle = os.open(log, os.O_WRONLY | os.O_CREAT)
            for number in (1, 2):  # after the streams before, which may have closed theirs
                os.dup2(handle, number)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            faulthandler.enable(handle)  # a segmentation fault leaves its traceback in the log
            resource.setrlimit(resource.RLIMIT_AS, (self.size + MEMORY, resource.RLIM_INFINITY))
            resource.setrlimit(resource.RLIMIT_CPU, (self.limit, self.limit))
            os.chdir(work)
            os.environ.update({"TERCET_DEBUG": "1"} if debug else {})
            cli.main(case.command, case.overrides)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1 if stop.code else 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def shrink(self, case: Case, here: Path, end: End) -> Case:
        """Leave out overrides, and parts of the damaged file, as long as the command ends in the same way."""
        left = TRIES

        def same(tried: Case) -> bool:
            nonlocal left
            left -= 1
            found = self.run(tried, here, debug=True)
            return (found.fault, found.place) == (end.fault, end.place)

        for override in reversed(case.overrides):
            tried = replace(case, overrides=tuple(o for o in case.overrides if o is not override))
            if left > 0 and same(tried):
                case = tried
        file = here / case.changed if case.changed else None
        if file is None or not file.is_file():
            return case
        size = len(file.read_bytes()) // 2
        while size and left > 0:
            start = 0
            while start < len(data := file.read_bytes()) and left > 0:
                file.write_bytes(data[:start] + data[start + size :])
                if not same(case):
                    file.write_bytes(data)
                    start += size
            size //= 2
        return case


def _wait(process: int, limit: float) -> int | None:
    """The status of a child; None where it was killed after ``limit`` seconds."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return status
        time.sleep(0.005)
    os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None


def classify(status: int | None, output: str) -> End:
    """What a status of ``os.waitpid`` and the output of a command say."""
    frames = re.findall(r'File ".*?/(tercet/[\w/]+\.py)", line \d+,? in (\S+)', output)
    raised = re.findall(r"^((?:\w+\.)*[A-Z]\w*)(?::|$)", output, re.MULTILINE)
    place = f"{raised[-1] if raised else ''} in {':'.join(frames[-1]) if frames else ''}"
    message = re.search(r"^error: (.*)", output.replace("\r", "\n"), re.MULTILINE)
    if status is None:
        return End("hang", output)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL):
        return End("hang", output)
    if os.WIFSIGNALED(status):
        return End("signal", output, signal.Signals(os.WTERMSIG(status)).name)
    code = os.WEXITSTATUS(status)
    if (message and UNEXPLAINED in message[1]) or code == 70:
        return End("unexplained", output, place)
    usage = code == 2 and "usage: " in output
    if not usage and code != (1 if message else 0):
        return End("wrong exit code", output, f"code {code}")
    return End("refused" if message or usage else "accepted", output, place)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--inputs", type=int, default=1000)
    parser.add_argument("--start", type=int, default=0, help="the number of the first input")
    parser.add_argument("--only", type=int, help="one number, with its output")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=int, default=30, help="of CPU time, after which a command hangs")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/fuzz"), help="a folder")
    return parser.parse_args()


def prepare(place: Path, trained: bool = True) -> None:
    """Make the good inputs, and import what commands need, so that each child is warm; ``trained``: also a run to resume."""
    os.environ.pop("TERCET_DATA", None)  # the inputs are all in ``place``
    os.environ.update({"WANDB_MODE": "disabled", "TERCET_CACHE": str(place / "cache"), "HYDRA_FULL_ERROR": "1"})
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    for name in ("compare", "mine", "export", "stages"):  # and all that they import
        importlib.import_module(f"tercet.app.commands.{name}")
    make_materials(place)
    if not trained:
        return
    cli.OmegaConf.register_new_resolver("run_id", lambda: "id", replace=True)

    def composed(command: str, overrides: list[str]) -> Any:
        with initialize_config_dir(cli.config_folder(), version_base="1.3"):
            return compose(command, overrides)

    read_keys(composed, Path(cli.config_folder()))
    given = [o for o in training(place) if not o.startswith(("check=", "output_dir="))]
    data = ("data=text", f"data.path={place}/pairs.txt", "data.held_out=4", f"output_dir={place}/trained")
    end = Fuzzer(0, [], place, 60).run(Case("train", (*given, *data)), place / "runs")
    if end.fault != "accepted":
        raise SystemExit(f"A good run is not accepted: {end}")


def fuzz(options: argparse.Namespace, place: Path) -> list[dict[str, Any]]:
    """Run the inputs and keep what went wrong; a row for each kind."""
    fuzzer = Fuzzer(options.seed, options.kinds, place, options.seconds)
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in options.kinds}
    places: Counter[str] = Counter()
    for number in range(options.start, options.start + options.inputs):
        with tempfile.TemporaryDirectory() as folder:
            here = Path(folder)
            kind, case = fuzzer.draw(number, here)
            end = fuzzer.run(case, here)
            counts[kind][end.fault] += 1
            if end.fault in FAULTS:
                end = end if end.fault == "hang" else fuzzer.run(case, here, debug=True)
                place_name = f"{end.fault}: {end.place}"
                places[place_name] += 1
                print(f"{number} {kind} {place_name}", flush=True)
                if places[place_name] <= 3:
                    case = fuzzer.shrink(case, here, end) if end.fault != "hang" else case
                    keep(options.output / "findings" / f"{options.seed}-{number}-{kind}", case, here, fuzzer.run(case, here))
        if number % 100 == 99:
            print(f"{number + 1 - options.start} of {options.inputs}", flush=True)
    for name, count in places.most_common():
        print(f"{count:5} {name}")
    names = ("accepted", "refused", *FAULTS)
    return [
        {"kind": kind, "inputs": sum(found.values()), **{name: found[name] for name in names}} for kind, found in counts.items()
    ]


def keep(folder: Path, case: Case, here: Path, end: End) -> None:
    """Write an input, its command and what it printed."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(here, folder, symlinks=True)
    text = f"tercet {case.command} {shlex.join(case.overrides)}\n"
    (folder / "command.txt").write_bytes(text.encode(errors="surrogateescape"))
    (folder / "output.txt").write_bytes(end.output.encode(errors="replace"))


def main() -> None:
    """Print the table; exits with 1 if an input met a fault."""
    options = arguments()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        prepare(place)
        if options.only is not None:
            here = place / "only"
            here.mkdir()
            fuzzer = Fuzzer(options.seed, options.kinds, place, options.seconds)
            kind, case = fuzzer.draw(options.only, here)
            end = fuzzer.run(case, here, debug=True)
            keep(options.output / "only", case, here, end)
            print(f"{kind}: {case}\n{end.output}\n{end.fault}: {end.place}")
            return
        start = time.perf_counter()
        rows = fuzz(options, place)
    faults = sum(row[name] for row in rows for name in FAULTS)
    write(
        options.output / "fuzz.json",
        rows,
        {"seed": options.seed, "minutes": (time.perf_counter() - start) / 60, **surroundings(1)},
    )
    raise SystemExit(bool(faults))


if __name__ == "__main__":
    main()
