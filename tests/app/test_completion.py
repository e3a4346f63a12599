"""Shells complete commands, groups, choices, keys and files: real shells on a pseudo-terminal, and the candidates alone."""

import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tercet.app.cli import COMMANDS, TASKS
from tercet.app.commands import completion

SHELLS = {
    "bash": (["--norc", "--noprofile", "-i"], 'eval "$(tercet completion bash)"'),
    "zsh": (["-f", "-i"], 'autoload -Uz compinit; compinit -u -D; eval "$(tercet completion zsh)"'),
    "fish": (["--no-config", "-i"], "tercet completion fish | source"),
}
LINES = {  # what is typed -> what the tab key makes of it, in each shell
    "tercet comple": "tercet completion ",
    "tercet train data=te": "tercet train data=text ",
    "tercet train evaluation@te": "tercet train evaluation@test=",
    "tercet train data=text data.pa": "tercet train data=text data.path=",
    "tercet train data=text data.path=my_t": "tercet train data=text data.path=my_texts.csv ",
    "tercet train loss=triplet loss.ma": "tercet train loss=triplet loss.margin=",
    "tercet compare old": "tercet compare old run/",
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One folder of what is remembered, for all tests."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def here(tmp_path, cache, monkeypatch):
    (tmp_path / "my_texts.csv").touch()
    (tmp_path / "old run").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TERCET_CACHE", str(cache))
    return tmp_path


class Terminal:
    """A shell on a pseudo-terminal, in which words are typed."""

    def __init__(self, shell, folder):
        program = folder / "bin" / "tercet"
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m tercet "$@"\n')
        program.chmod(0o755)
        options, setup = SHELLS[shell]
        path = f"{program.parent}:{os.environ['PATH']}"
        self.seen = ""
        self.pid, self.handle = pty.fork()
        if not self.pid:
            os.environ.update(
                PATH=path, HOME=str(folder), TERM="dumb", PS1="> ", COLUMNS="200", PYTHONPATH=os.pathsep.join(sys.path)
            )
            os.execvp(shell, [shell, *options])
        self.type(f"{setup}\n")
        self.type("echo re''ady\n")
        self.wait_for("ready\r\n")

    def type(self, text):
        os.write(self.handle, text.encode())

    def wait_for(self, text, seconds=20):
        ends = time.monotonic() + seconds
        while text not in self.seen:
            if select.select([self.handle], [], [], 0.1)[0]:
                data = os.read(self.handle, 65536).decode(errors="replace")
                if "\x1b[c" in data:  # fish asks what kind of terminal this is
                    os.write(self.handle, b"\x1b[?62c")
                self.seen += re.sub(r"\x1b\[[?>=0-9;]*[a-zA-Z]|\x1b[()=>][0B]?|\x1b\][^\x07\x1b]*(\x07|\x1b\\)", "", data)
            assert time.monotonic() < ends, self.seen
        before, _, self.seen = self.seen.partition(text)
        return before

    def completed(self, line):
        """The line after the tab key; "END" is typed behind the cursor, which the shell may have moved by a space."""
        self.type(f"{line}\tEND\x01echo re''sult: \n")  # back to the start of the line: the shell prints what it has become
        self.wait_for("result: ")
        return self.wait_for("END\r\n")

    def close(self):
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.handle)


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_completes(shell, here):
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    for line in LINES:
        completion.candidates(line)  # remembered: the shells answer at once
    terminal = Terminal(shell, here)
    try:
        assert {line: terminal.completed(line) for line in LINES} == LINES
    finally:
        terminal.close()


def test_a_line_is_completed_without_loading_torch_and_by_a_remembered_one_without_hydra(here):
    code = (
        "import sys; from tercet.app.commands.completion import main; main(['query', 'tercet export precision=']);"
        "main(['query', 'tercet export seed']); print([m for m in ('torch', 'hydra') if m in sys.modules])"
    )
    found = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout for _ in range(2)]
    assert [text.splitlines()[-2:] for text in found] == [["seed=", "['hydra']"], ["seed=", "[]"]]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("", sorted(COMMANDS)),
        ("TERCET_DATA=x tercet evalu", ["evaluate"]),
        ("tercet completion ", ["bash", "fish", "zsh"]),
        ("tercet doctor --", ["--help", "--json", "--online"]),
        ("tercet train --m", ["--multirun"]),
        ("tercet train --cfg ", ["job"]),
        ("tercet runs li", ["list"]),
        ("tercet runs prune --y", ["--yes"]),
        ("tercet train objective=simcse_unsup,q", ["objective=simcse_unsup,quick_thoughts"]),
        ("tercet train check=t", ["check=true"]),
        ("tercet train hydra/l", ["hydra/launcher="]),
        ("tercet train ~sam", ["~sampler="]),
        ("tercet evaluate model=min", ["model=minilm"]),
        ("tercet evaluate model=old", ["model=old run/"]),
        ("tercet evaluate hydra", []),
        ("tercet mine data.path='my_te", ["data.path=my_texts.csv"]),
        ("tercet nonsense my", ["my_texts.csv"]),
    ],
)
def test_candidates(line, found, here):
    assert completion.candidates(line) == found


def test_choices_of_a_folder_of_the_user(here):
    (here / "my_conf" / "loss").mkdir(parents=True)
    (here / "my_conf" / "loss" / "mine.yaml").write_text("_target_: mine.Loss\nsharpness: 2\n")
    assert completion.candidates("tercet train --config-dir=my_conf loss=m") == ["loss=mine"]
    assert completion.candidates("tercet train --config-dir my_conf loss=mine loss.s") == ["loss.sharpness="]
    (here / "my_conf" / "loss" / "mine.yaml").write_text("_target_: mine.Loss\nfocus: 2\n")
    assert completion.candidates("tercet train --config-dir my_conf loss=mine loss.f") == ["loss.focus="]  # nothing stale


def test_a_line_that_does_not_compose_is_completed_as_if_it_were_not_there(here):
    assert completion.candidates("tercet train loss=none_such loss.temp") == ["loss.temperature="]


def test_a_cache_that_cannot_be_written_costs_time_only(here, monkeypatch):
    monkeypatch.setenv("TERCET_CACHE", str(here / "my_texts.csv"))
    assert completion.candidates("tercet export prec") == ["precision="]


def test_every_command_belongs_to_one_task():
    assert sorted(name for names in TASKS.values() for name in names if name in COMMANDS) == sorted(COMMANDS)
