"""The command ``doctor``: what training needs of this machine, what is there, and how to get the rest.

Nothing heavy is imported before it is known to be installed, and nothing is asked of the network without ``--online``.
"""

import argparse
import importlib
import json
import os
import platform
import re
import shutil
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from tercet import __version__
from tercet.app import config_folder
from tercet.errors import refuse_arguments
from tercet.messages import printable
from tercet.paths import cache_folder

OK, NOTE, MISSING = "ok", "note", "missing"  # only what is missing keeps training from starting
LEAST_DISK = 1e9  # bytes: the quickstart's run folder, its checkpoints included
TIMEOUT = 5.0  # seconds for the hub to answer
DEVELOPMENT = ("dev", "docs")  # extras of who works on Tercet itself


@dataclass(frozen=True)
class Check:
    """One line of the answer: ``advice`` says how to get what is missing."""

    name: str
    status: str
    value: str
    advice: str = ""


def main(arguments: Sequence[str]) -> int:
    """Print all checks; 0 if `tercet train` can start, else 1."""
    about = "Whether training can start here, and what is missing."
    parser = argparse.ArgumentParser(prog="tercet doctor", allow_abbrev=False, description=about)
    parser.error = refuse_arguments  # type: ignore[method-assign]
    parser.add_argument("--json", action="store_true", help="one JSON object: ok, and a list of checks")
    parser.add_argument("--online", action="store_true", help="also ask whether the hub can be reached")
    options = parser.parse_args(list(arguments))
    checks = list(run_checks(options.online))
    missing = [check.name for check in checks if check.status == MISSING]
    if options.json:
        print(json.dumps({"ok": not missing, "checks": [asdict(check) for check in checks]}, indent=2))
        return bool(missing)
    for check in checks:
        print(printable(f"{check.status:8}{check.name}: {check.value}"))
        if check.advice:
            print(printable(f"{'':8}→ {check.advice}"))
    print(f"\nTraining cannot start. Missing: {', '.join(missing)}." if missing else "\nTraining can start: tercet train")
    return bool(missing)


def run_checks(online: bool = False) -> Iterator[Check]:
    """Make all checks, cheap ones first."""
    yield from check_installation()
    packages = list(check_packages())
    yield from packages
    yield from check_extras()
    yield check_disk("outputs", Path.cwd() / "outputs", "Start in a folder on another disk, or set output_dir.")
    yield check_disk("cache of tokens", cache_folder(), "Set TERCET_CACHE to a folder on another disk.")
    yield check_data()
    yield check_hub(online)
    if all(check.status != MISSING for check in packages):
        try:
            yield from check_torch()
            yield check_training()
        except Exception as error:  # of any library, while it is imported
            fault = f"cannot be imported ({type(error).__name__}: {error})"
            yield Check("training", MISSING, fault, "Install the packages again, in a fresh environment.")


def check_installation() -> Iterator[Check]:
    """Tercet's version and Python's."""
    from packaging.specifiers import SpecifierSet

    distribution = _distribution("tercet")
    value = f"{__version__} in {Path(__file__).parents[2]}"
    if distribution is None:
        yield Check("tercet", NOTE, f"{value}, not installed", "What it needs is not known: pip install -e . in the checkout.")
    elif distribution.version != __version__:
        advice = "Install it again: what it needs may have changed since."
        yield Check("tercet", NOTE, f"{value}, installed as {distribution.version}", advice)
    else:
        yield Check("tercet", OK, value)
    asked = str(distribution.metadata["Requires-Python"] or "") if distribution else ""
    right = SpecifierSet(asked).contains(platform.python_version(), prereleases=True)
    value = f"{platform.python_version()} in {sys.prefix}, {platform.system()} {platform.machine()}"
    yield Check("python", OK if right else MISSING, value, "" if right else f"Python {asked} is needed.")


def check_packages() -> Iterator[Check]:
    """Each package that Tercet itself needs, against the versions that its metadata asks for."""
    for requirement in requirements():
        version, right = _installed(requirement)
        value = f"{version or 'not installed'} (asked: {requirement.specifier})"
        advice = "" if right else f"pip install '{requirement.name}{requirement.specifier}'"
        yield Check(requirement.name, OK if right else MISSING, value, advice)


def check_extras() -> Iterator[Check]:
    """Each extra: whether all its packages are installed. `tercet train` as it stands needs the model and data of one."""
    for extra in extras():
        wanted = requirements(extra)
        absent = [f"{needed.name}{needed.specifier}" for needed in wanted if not _installed(needed)[1]]
        status = (MISSING if extra == "quickstart" else NOTE) if absent else OK
        value = f"without {', '.join(absent)}" if absent else f"installed ({', '.join(needed.name for needed in wanted)})"
        yield Check(f"extra {extra}", status, value, f"pip install 'tercet[{extra}]'" if absent else "")


def extras() -> list[str]:
    """The extras that users install, in the order of the alphabet."""
    distribution = _distribution("tercet")
    known = distribution.metadata.get_all("Provides-Extra") or [] if distribution else []
    return sorted(set(known) - set(DEVELOPMENT))


def requirements(extra: str = "") -> list[Any]:
    """What Tercet itself needs here (``packaging.requirements.Requirement``), or one of its extras."""
    from packaging.requirements import Requirement

    distribution = _distribution("tercet")
    found = [Requirement(line) for line in (distribution.requires or [] if distribution else [])]
    return [needed for needed in found if _applies(needed, extra) and not (extra and _applies(needed, ""))]


def _applies(requirement: Any, extra: str) -> bool:
    return requirement.marker is None or bool(requirement.marker.evaluate({"extra": extra}))


def _distribution(name: str) -> metadata.Distribution | None:
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None


def _installed(requirement: Any) -> tuple[str | None, bool]:
    """The version that is installed, and whether it is one of those asked for."""
    distribution = _distribution(requirement.name)
    version = distribution.version if distribution else None
    return version, version is not None and requirement.specifier.contains(version, prereleases=True)


def check_torch() -> Iterator[Check]:
    """What torch was built for, the devices that it finds, and memory."""
    import torch

    from tercet.models.engine.chunking import free_memory

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}" if torch.version.hip else "CPU"
    yield Check("torch build", OK, f"{torch.__version__}, for {build}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = _memory(free_memory(torch.device("cpu")), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    yield Check("cpu", OK, f"{cores} cores, {torch.get_num_threads()} threads in torch; {memory}")
    for index in range(torch.cuda.device_count()):
        memory = _memory(*torch.cuda.mem_get_info(index))
        yield Check(f"cuda:{index}", OK, f"{torch.cuda.get_device_name(index)}; {memory}")
    if not torch.cuda.is_available():
        driver = Path("/proc/driver/nvidia/version").exists()
        reason = "a driver is there, but torch cannot use it" if driver else "none; training runs on the CPU"
        advice = "Install a build of torch for a CUDA that this driver has: https://pytorch.org/get-started" if driver else ""
        yield Check("gpu", NOTE, reason, advice)


def check_disk(name: str, folder: Path, advice: str) -> Check:
    """Whether the folder, or the first above it that is there, can be written and has room."""
    place = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(place).free
    value = f"{folder}: {_size(free)} free"
    if not os.access(place, os.W_OK | os.X_OK) or not place.is_dir():
        return Check(name, MISSING, f"{folder} cannot be written", advice)
    return Check(name, *((MISSING, value, f"{_size(LEAST_DISK)} are needed. {advice}") if free < LEAST_DISK else (OK, value)))


def data_files() -> list[str]:
    """The files that the configuration reads from the data root."""
    texts = (path.read_text(encoding="utf-8") for path in Path(config_folder()).rglob("*.yaml"))
    return sorted({name for text in texts for name in re.findall(r"^[^#\n]*?(\w+\.parquet)", text, re.MULTILINE)})


def check_data() -> Check:
    """The data sets of the experiments but the quickstart, below TERCET_DATA."""
    root, files = os.environ.get("TERCET_DATA"), data_files()
    advice = "docs/lab/README.md says what the files are and where they come from."
    if not root:
        return Check("TERCET_DATA", NOTE, "not set: the quickstart and your own data need no more, others do", advice)
    absent = [name for name in files if not (Path(root) / name).is_file()]
    value = f"{root}: {len(files) - len(absent)} of {len(files)} files"
    return Check("TERCET_DATA", *((NOTE, f"{value}; not {', '.join(absent)}", advice) if absent else (OK, value)))


def check_hub(online: bool) -> Check:
    """Whether models and data of the Hugging Face Hub can be had; asked only if ``online``."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    if offline or not online:
        return Check("hub", OK, "not used: HF_HUB_OFFLINE is set" if offline else f"{endpoint}, not asked (--online does)")
    try:
        with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=TIMEOUT):
            return Check("hub", OK, f"{endpoint} answers")
    except (OSError, ValueError) as error:  # no connection, or no URL
        advice = "Only models and data sets of the hub need it; HF_ENDPOINT names a mirror."
        return Check("hub", NOTE, f"{endpoint} does not answer ({error})", advice)


def check_training() -> Check:
    """Import the whole of training, which finds broken installations, and say whether W&B has an account."""
    importlib.import_module("tercet.app.commands.train")
    loggers = importlib.import_module("tercet.training.loggers")
    account = "an account is set up" if loggers.has_account() else "no account (`wandb login` before logger=wandb)"
    mode = os.environ.get("WANDB_MODE")
    return Check("W&B", OK, f"{account}; runs are written offline by default" + (f"; WANDB_MODE={mode}" if mode else ""))


def _memory(free: float, total: float) -> str:
    return f"memory: {_size(free)} free of {_size(total)}"


def _size(number: float) -> str:
    return f"{number / 1e9:.1f} GB"
