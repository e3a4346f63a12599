"""The command line, run as a user does but in this process: imports are paid once."""

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hydra._internal.hydra import Hydra

from tercet.app.cli import main
from tercet.app.run_files import read_metrics
from tercet.models.folder import read_checkpoint
from tests.conftest import TEXTS, restored_signals, tiny


@dataclass(frozen=True)
class Result:
    """What a command left: exit code, terminal, and the folder of its run."""

    code: int
    terminal: str
    output: Path

    def metrics(self):
        """The run's metrics.json."""
        return read_metrics(self.output)


def skip_get_mode(set_attribute=setattr):
    """Hydra composes once more to look whether a configuration sets ``hydra.mode``; none of these does, and it takes 0.2 s."""
    set_attribute(Hydra, "get_mode", lambda self, config_name, overrides: None)


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """``command("train", *overrides) -> Result``, writing into a temporary folder."""
    monkeypatch.setenv("TERCET_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TERCET_DEBUG", raising=False)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # the entry sets it: put back afterwards
    skip_get_mode(monkeypatch.setattr)

    def run(name, *overrides):
        output = tmp_path / "run"
        extra = [f"output_dir={output}"] if name == "train" and "-m" not in overrides else []
        monkeypatch.setattr(sys, "argv", ["tercet", *overrides, *extra])
        with pytest.raises(SystemExit) as stopped, restored_signals():
            main(name)
        seen = capsys.readouterr()
        return Result(stopped.value.code or 0, seen.out + seen.err, output)

    return run


def write_texts(path):
    """Forty sentences, long enough to be halved."""
    path.write_text("\n".join(f"{a} {b}" for a in TEXTS[:8] for b in TEXTS[:5]) + "\n")


FAST = [
    "logger=csv",
    "callback.summary=null",
    "callback.embeddings.source=null",  # drawing takes a third of such a run
    "selection=none",
    "trainer.accelerator=cpu",
    "trainer.max_steps=2",
    "data.batch_size=4",
]


@pytest.fixture
def small(command, tmp_path):
    """``small(*overrides)``: two steps of a tiny model on a few sentences of one's own."""
    path = tmp_path / "my.txt"
    write_texts(path)

    def run(*overrides):
        given = {override.split("=")[0] for override in overrides}
        few = [override for override in FAST if override.split("=")[0] not in given]
        return command("train", *tiny("data=text", f"data.path={path}", *few, *overrides))

    return run


@pytest.fixture
def run(command, tmp_path):
    """``run(*overrides)``: three epochs of a few batches with dropout, a checkpoint every second step."""
    write_texts(tmp_path / "my.txt")
    texts = (tmp_path / "my.txt").read_text().replace(",", "").splitlines()
    (tmp_path / "labels.csv").write_text(
        "\n".join(["text,topic", *(f"{x},{'abc'[i % 3]}" for i, x in enumerate(texts))]) + "\n"
    )
    few = [o for o in FAST if "max_steps" not in o]
    every = ["save_every=2", "measure_before=false", "trainer.max_epochs=3", "logger=none", f"data.path={tmp_path}/my.txt"]

    def run(*more):
        return command("train", *tiny("data=text", *few, *every, *(o.replace("{folder}", str(tmp_path)) for o in more)))

    return run


@pytest.fixture
def whole(run, tmp_path):
    """``whole(*overrides)``: the folder of a run that nothing stopped, out of the way of the next."""

    def made(*more):
        result = run(*more)
        assert result.code == 0, result.terminal
        return result.output.rename(tmp_path / "whole")

    return made


def weights(output):
    return read_checkpoint(output / "checkpoints" / "last.ckpt")["state_dict"]


def assert_same_weights(output, other):
    """Bit by bit."""
    found, expected = weights(output), weights(other)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
