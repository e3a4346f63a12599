"""The processes of one machine listen where no other machine reaches them."""

import os
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from tests.end_to_end.test_processes import PAIRS, folder, start  # noqa: F401 - a fixture

LISTENING = "0A"


def descendants(root):
    """The process ids of a process's children, their children, and so on."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = {root}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {root}


def listeners(pid):
    """The addresses, in the kernel's hexadecimal, that a process listens at."""
    try:
        sockets = {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()}
        lines = [
            line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]
        ]
    except OSError:
        return set()
    return {line[1].split(":")[0] for line in lines if line[3] == LISTENING and f"socket:[{line[9]}]" in sockets}


@pytest.fixture
def watched():
    """The addresses that processes started by this one have listened at."""
    seen, ended = set(), threading.Event()

    def watch():
        while not ended.wait(0.05):
            for pid in descendants(os.getpid()):
                seen.update(listeners(pid))

    thread = threading.Thread(target=watch)
    thread.start()
    yield seen
    ended.set()
    thread.join()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads /proc")
@pytest.mark.parametrize(
    "overrides", [["trainer.devices=2"], ["trainer.devices=1"], ["trainer.strategy=fsdp2", "trainer.devices=1"]]
)
def test_processes_of_one_machine_listen_on_loopback(folder, watched, overrides):  # noqa: F811
    code, text = start(folder, *PAIRS, "measure_before=false", "evaluation@test=none", *overrides)
    assert code == 0, text
    loopback = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
    assert watched <= loopback, watched
    assert bool(watched) == (overrides != ["trainer.devices=1"]), "one process needs no sockets"
