"""Signals as ``timeout``, schedulers and terminals send them: to the whole process group."""

import itertools
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.optim import AdamW

from tercet.app.run_list import find_run
from tercet.app.signals import HANDLED
from tercet.data import TextTransform
from tercet.distributed.processes import STOP_SIGNALS, start_processes
from tercet.evaluation import Retrieval
from tercet.models import CachedEncoder
from tercet.models.folder import read_checkpoint
from tercet.search.vectors import VectorInfo, write_vectors
from tests.conftest import MINILM, tiny
from tests.end_to_end.conftest import FAST, write_texts
from tests.end_to_end.forked import Forked, descendants
from tests.end_to_end.test_train_images import TINY, people  # noqa: F401 - a fixture

QUIET = ["callback.progress=null", "trainer.enable_progress_bar=false", "trainer.enable_model_summary=false", "logger=none"]
ENDLESS = [*(o for o in FAST if not o.startswith(("trainer.max_steps", "logger"))), *QUIET, "measure_before=false",
           "trainer.max_steps=1000000", "trainer.max_epochs=-1", "save_every=1", "output_dir=run"]  # fmt: skip
IMAGES = ["data=images", "data.path=people", "objective=facenet", "sampler.per_label=2", "evaluation@test=none",
          "data.held_out=0", "data.test=null", *TINY, *ENDLESS]  # fmt: skip
WORKERS = {
    "one process": (["data.workers=2"], 2),
    "two processes": (["data.workers=1", "trainer=ddp_cpu", "trainer.devices=2"], 4),
}


def text_run(folder, *more, **environment):
    write_texts(folder / "my.txt")
    return Forked(folder, "train", tiny("data=text", "data.path=my.txt", *ENDLESS, *more), environment=environment)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("kind", WORKERS)
def test_a_signal_to_the_group_saves_the_step(tmp_path, kind, number):
    more, workers = WORKERS[kind]
    slurm = {}
    if number == signal.SIGUSR1:
        program = tmp_path / "bin" / "scontrol"
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked.txt\n')
        program.chmod(0o755)
        slurm = {"SLURM_JOB_ID": "42", "SLURM_NTASKS": "1", "PATH": f"{program.parent}:{os.environ['PATH']}"}
    run = text_run(tmp_path, *more, **slurm)
    saved = tmp_path / "run" / "checkpoints"
    run.wait_for((saved / "last.ckpt").is_file)
    run.wait_for(lambda: len(descendants(run.pid)) >= workers)
    assert find_run(str(tmp_path / "run")).state == "running"
    before = run.said()
    os.killpg(run.pid, number)
    os.killpg(run.pid, number)  # as `timeout` does: to the process and to its group
    code = run.end(30)
    lines = run.said().removeprefix(before).strip().splitlines()
    assert code == {signal.SIGINT: 130}.get(number, 143), lines
    assert len(lines) == (2 if slurm else 1) and lines[0].startswith("stopped"), lines
    assert find_run(str(tmp_path / "run")).state == "stopped"
    step = read_checkpoint(saved / "last.ckpt")["global_step"]
    assert lines[0] == f"stopped at step {step}; run holds it. The same command with output_dir=run resume=true continues."
    if kind == "two processes":
        assert step == int(torch.load(saved / "random-1.pt", weights_only=True)["step"])
    if slurm:
        assert (tmp_path / "asked.txt").read_text().split() == ["requeue", "42"]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_begin_without_the_signals_that_stop_a_run(method):
    process = multiprocessing.get_context(method).Process(target=time.sleep, args=(60,))
    start_processes([process])
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
        blocked = int(next(line for line in status.splitlines() if line.startswith("SigBlk")).split()[1], 16)
        assert {number for number in signal.Signals if blocked >> (number - 1) & 1} == STOP_SIGNALS == {*HANDLED}
    finally:
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_images_too(
    people,  # noqa: F811
    tmp_path,
    number,
):
    """Which workers read, unless told otherwise."""
    run = Forked(tmp_path, "train", IMAGES)
    run.wait_for((tmp_path / "run" / "checkpoints" / "last.ckpt").is_file)
    run.wait_for(lambda: descendants(run.pid))
    os.killpg(run.pid, number)
    assert run.end(30) == {signal.SIGINT: 130, signal.SIGTERM: 143}[number], run.said()
    assert "Traceback" not in run.said() and run.said().rstrip().splitlines()[-1].startswith("stopped"), run.said()


def test_a_signal_while_a_checkpoint_is_restored_writes_none(run, monkeypatch):
    """What is restored in part must not become the newest checkpoint."""
    assert run("trainer.max_epochs=1").code == 0
    original = AdamW.load_state_dict

    def told(self, state):
        signal.raise_signal(signal.SIGTERM)
        original(self, state)

    with monkeypatch.context() as patch:
        patch.setattr(AdamW, "load_state_dict", told)
        stopped = run("trainer.max_epochs=2", "resume=true")
    assert stopped.code == 143, stopped.terminal
    state = read_checkpoint(stopped.output / "checkpoints" / "last.ckpt")["optimizer_states"][0]["state"]
    assert state, "AdamW's moments"


@pytest.mark.parametrize(
    ("name", "more", "said"),
    [
        ("train", ["data=text", "data.path={folder}/my.txt"], "stopped before training began; there is nothing to keep"),
        (
            "train",
            ["-m", "seed=1,2", "data=text", "data.path={folder}/my.txt"],
            "stopped; finished jobs and checkpoints are kept.",
        ),
        ("evaluate", ["model=minilm", "evaluation=sts", "output=m.json"], "stopped; nothing was written"),
        ("export", ["model=minilm", "output=onnx"], "stopped; nothing was written"),
        ("encode", ["model=minilm", "data.path={folder}/my.txt", "output=v.npy"], "stopped; nothing is kept yet"),
        (
            "encode",
            ["model=minilm", "data.path={folder}/my.txt", "output=w.npy"],
            "stopped; 9 of 12 are encoded and kept: the same",
        ),
        (
            "encode",
            ["model=minilm", "data.path={folder}/my.txt", "output=index"],
            "stopped; 6 of 6 are encoded and kept: the same",
        ),
    ],
)
def test_a_stop_says_what_is_kept(command, tmp_path, monkeypatch, name, more, said):
    write_texts(tmp_path / "my.txt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    shards = tmp_path / ".w.npy.shards"
    shards.mkdir()
    (shards / "settings.json").write_text('{"rows": 3, "info": {"count": 12}}')
    for number in range(3):
        (shards / f"{number:08d}.npy").touch()
    (tmp_path / ".index.vectors").mkdir()
    write_vectors(
        tmp_path / ".index.vectors" / "vectors.npy", VectorInfo(6, 2, "float32"), [(np.zeros((6, 2), np.float32), [], [])]
    )

    def stop(*_, **__):
        raise KeyboardInterrupt

    for place in ("train.prepare", "evaluate.open_with_note", "encode.encode_to", "encode.encode_index"):
        monkeypatch.setattr(f"tercet.app.commands.{place}", stop)
    stopped = command(name, *(o.replace("{folder}", str(tmp_path)) for o in more))
    assert stopped.code == 130 and stopped.terminal.rstrip().splitlines()[-1].startswith(said), stopped.terminal


def test_a_run_that_fails_before_it_writes_leaves_no_folder(command, tmp_path):
    failed = command("train", *tiny("data=text", "data.path=missing.txt"))
    assert failed.code == 1 and not failed.output.exists(), failed.terminal


def told_ready_and_waits(*_args, **_kwargs):
    Path("ready").touch()
    time.sleep(60)


def slow_tokenization():
    TextTransform.load = told_ready_and_waits


def slow_measurement():
    Retrieval.__call__ = told_ready_and_waits


def slow_encoding():
    CachedEncoder.__call__ = told_ready_and_waits


TABLE = ["data.path=pairs.csv", "data.columns=[a,b]"]
MODEL = [f"model={MINILM}"]
WAITING = {
    "reading": (slow_tokenization, "train", tiny("data=text", "data.path=my.txt", *ENDLESS)),
    "measuring": (slow_measurement, "train", tiny("data=text", "data.path=my.txt", *ENDLESS, "measure_before=true")),
    "evaluating": (slow_measurement, "evaluate", [*MODEL, "evaluation=retrieval", "evaluation.source.path=pairs.csv",
                                                  "evaluation.source.columns=[a,b]", "output=new/result.json"]),
    "mining": (slow_encoding, "mine", [*MODEL, *TABLE, "output=new/negatives.csv"]),
}  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("kind", WAITING)
def test_what_saves_nothing_ends_at_once_in_one_line(tmp_path, kind, number):
    write_texts(tmp_path / "my.txt")
    rows = [line.replace(",", "") for line in (tmp_path / "my.txt").read_text().splitlines()]
    (tmp_path / "pairs.csv").write_text("\n".join(["a,b", *(f"{a},{b}" for a, b in itertools.pairwise(rows))]) + "\n")
    prepare, command, overrides = WAITING[kind]
    run = Forked(tmp_path, command, overrides, prepare)
    run.wait_for((tmp_path / "ready").is_file)
    before = run.said()
    os.killpg(run.pid, number)
    os.killpg(run.pid, number)
    assert run.end(30) == {signal.SIGTERM: 143, signal.SIGINT: 130}[number], run.said()
    lines = run.said().removeprefix(before).strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("stopped"), lines
    assert not (tmp_path / "new").exists(), "no empty folder"
    assert (tmp_path / "run").exists() == (kind == "measuring")
