"""Several processes from the command line: started here, or joined under torchrun."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tercet.app.run_list import find_run
from tercet.models.folder import read_checkpoint
from tests.conftest import CONF, tiny
from tests.end_to_end.conftest import FAST, write_texts
from tests.end_to_end.forked import Forked, alive, descendants

OWN = [f for f in FAST if not f.startswith("trainer.accelerator")] + ["callback.progress=null", "model.backbone.dropout=0"]
PAIRS = ["data=text", "data.path=pairs.csv", "data.columns=[a,b]", "objective=simcse_sup", "trainer=ddp_cpu"]
ENDLESS = [*OWN, *PAIRS, "trainer.devices=2", "data.batch_size=8", "trainer.max_steps=1000000", "trainer.max_epochs=-1",
           "measure_before=false", "save_every=1", "output_dir=run"]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    write_texts(tmp_path / "my.txt")
    lines = (tmp_path / "my.txt").read_text().splitlines()
    rows = "".join(f'"{a}","{b}"\n' for a, b in itertools.pairwise(lines))
    (tmp_path / "pairs.csv").write_text("a,b\n" + rows)
    return tmp_path


def start(folder, *overrides):
    run = Forked(folder, "train", tiny(*OWN, *overrides))
    return run.end(120), run.said()


def start_by(folder, *overrides, by=()):
    """The same in new processes, by the command line."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERCET_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *by, str(CONF.parent / "train.py"), *tiny(*OWN, *overrides)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    return done.returncode, done.stdout + done.stderr


def metrics(folder):
    return json.loads((Path(folder) / "metrics.json").read_text())


def same(one, other):
    names = [n for n in one if n.startswith(("before/", "test/")) or n == "train/loss"]
    assert {n: one[n] for n in names} == pytest.approx({n: other[n] for n in names}, rel=1e-3, abs=1e-4)


@pytest.mark.slow
def test_a_sweep_of_two_processes_each_learns_what_one_process_does(folder):
    alone = start(folder, *PAIRS, "trainer=cpu", "output_dir=alone", "data.batch_size=7")
    assert alone[0] == 0, alone[1]
    swept = start(folder, *PAIRS, "trainer.devices=2", "data.batch_size=7", "seed=1,2", "hydra.sweep.dir=sweep", "-m")
    assert swept[0] == 0, swept[1]
    assert "mean ± sd over 2 runs" in swept[1]
    same(metrics(folder / "alone"), metrics(folder / "sweep" / "0"))
    assert (folder / "sweep" / "1" / "model" / "model.safetensors").is_file()


@pytest.mark.slow
def test_weights_in_shares_learn_the_same_and_go_on(folder):
    shares = [*PAIRS, "trainer.strategy=fsdp2", "trainer.devices=2", "data.batch_size=7", "scheduler=constant", "monitor=null",
              "trainer.max_steps=4", "save_every=2"]  # fmt: skip
    alone = start(folder, *shares, "trainer=cpu", "trainer.strategy=auto", "trainer.devices=1", "output_dir=alone")
    assert alone[0] == 0, alone[1]
    for steps in (2, 4):
        code, text = start(folder, *shares, f"trainer.max_steps={steps}", "resume=true", "output_dir=shares")
        assert code == 0, text
    assert "step 2" in text
    same(metrics(folder / "alone"), metrics(folder / "shares"))


@pytest.mark.slow
def test_torchruns_processes_share_one_folder(folder):
    by = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    code, text = start_by(folder, *PAIRS, "trainer.devices=2", by=by)
    assert code == 0, text
    runs = list((folder / "outputs" / "own_texts").iterdir())
    assert len(runs) == 1
    assert "test/retrieval/text/mrr" in metrics(runs[0])


def test_a_mistake_in_a_process_is_one_message(folder):
    mistake = ["optimized_metric=train/none", "output_dir=run", "data.batch_size=8"]
    code, text = start(folder, *PAIRS, "trainer.devices=2", *mistake)
    assert code == 1
    assert text.count("error: ") == 1, text
    assert "optimized_metric=train/none was not measured" in text
    assert "Traceback" not in text
    assert (folder / "run" / "metrics.json").is_file(), "what was measured is not lost"


def endless(folder):
    """A run of two processes that only a signal ends, once it has saved something; and the processes."""
    run = Forked(folder, "train", tiny(*ENDLESS))
    run.wait_for((folder / "run" / "checkpoints" / "last.ckpt").is_file)
    run.wait_for(lambda: len(descendants(run.pid)) == 2)
    return run, descendants(run.pid)


def test_stopped_processes_save_the_same_step(folder):
    """SIGTERM to the first process, as some schedulers send it; test_signals.py has the process group."""
    run, workers = endless(folder)
    time.sleep(0.7)  # somewhere in a step
    os.kill(run.pid, signal.SIGTERM)
    assert run.end(45) == 143, run.said()  # after 50 seconds they would be killed
    assert "Traceback" not in run.said() and "error" not in run.said(), run.said()
    assert not alive(workers)
    saved = folder / "run" / "checkpoints"
    step = read_checkpoint(saved / "last.ckpt")["global_step"]
    assert step == int(torch.load(saved / "random-1.pt", weights_only=True)["step"])


def test_a_process_that_dies_ends_the_others_within_a_minute(folder):
    run, workers = endless(folder)
    os.kill(workers[1], signal.SIGKILL)
    killed = time.monotonic()
    assert run.end(60) == 1
    assert time.monotonic() - killed < 60
    assert "of 2 was ended by SIGKILL" in run.said() and "resume=true" in run.said(), run.said()
    assert not alive(workers)
    found = find_run(str(folder / "run"))
    assert found.state == "failed" and "of 2 was ended by SIGKILL" in found.error


def test_nothing_outlives_a_launcher_that_is_killed(folder):
    run = Forked(folder, "train", tiny(*ENDLESS, "data.workers=1"))
    run.wait_for(lambda: len(descendants(run.pid)) == 4)
    processes = descendants(run.pid)
    os.kill(run.pid, signal.SIGKILL)
    run.end()
    ends = time.monotonic() + 30
    while alive(processes) and time.monotonic() < ends:
        time.sleep(0.05)
    assert not alive(processes)
    assert find_run(str(folder / "run")).state == "dead"


@pytest.mark.slow
def test_every_process_goes_on_with_its_own_draws(folder):
    drawn = [*PAIRS, "trainer.devices=2", "data.batch_size=8", "scheduler=constant", "measure_before=false", "save_every=2",
             "model.backbone.dropout=0.3", "model.execution.dropout=torch", "trainer.max_epochs=-1"]  # fmt: skip
    whole = start(folder, *drawn, "trainer.max_steps=4", "output_dir=whole")
    assert whole[0] == 0, whole[1]
    for steps in (2, 4):
        code, text = start(folder, *drawn, f"trainer.max_steps={steps}", "resume=true", "output_dir=parts")
        assert code == 0, text
    assert (folder / "parts" / "checkpoints" / "random-1.pt").is_file()
    one, other = (read_checkpoint(folder / name / "checkpoints" / "last.ckpt")["state_dict"] for name in ("whole", "parts"))
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=0, msg=name)


EXITS = """
import atexit, os, sys
from tercet.app.signals import exit_at_once

class Watch:
    def __del__(self):
        print("finalized")

with exit_at_once():
    import torch
    torch.watch = Watch()  # lives as long as the interpreter
    atexit.register(print, "handler")
    if os.environ.get("INITIALIZED"):
        torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
    raise SystemExit(3)
"""


@pytest.mark.parametrize(("initialized", "said"), [("", "handler\nfinalized\n"), ("1", "handler\n")])
def test_a_process_with_a_group_exits_before_the_interpreter_is_finalized(initialized, said, tmp_path):
    """Threads of gloo would abort it in one of ten exits on a busy machine."""
    command = [sys.executable, "-c", EXITS, str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "INITIALIZED": initialized})
    assert (done.returncode, done.stdout) == (3, said), done.stderr
