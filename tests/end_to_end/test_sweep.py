"""Multiruns from the command line."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from omegaconf import OmegaConf
from optuna.distributions import CategoricalDistribution, FloatDistribution

from tercet.app.hydra_compat import parse_overrides
from tercet.app.run_files import read_metrics
from tercet.app.sweeps.optuna import study_url, to_distribution
from tercet.app.sweeps.ray import lost_job_result
from tests.conftest import tiny
from tests.end_to_end.conftest import FAST, write_texts
from tests.end_to_end.forked import Forked, SlowSteps, alive, descendants


def test_a_sweep_begun_again_makes_what_is_missing(command, tmp_path):
    write_texts(tmp_path / "my.txt")
    once = [o for o in FAST if not o.startswith("logger")]
    given = ["-m", *tiny("data=text", f"data.path={tmp_path / 'my.txt'}", *once), "logger=none", "measure_before=false",
             "sweep=temperature", "loss.temperature=0.05,0.1", "seed=1,2", f"hydra.sweep.dir={tmp_path / 'sweep'}"
    ]  # fmt: skip
    first = command("train", *given)
    assert first.code == 0 and "loss.temperature" in first.terminal, first.terminal
    kept = (tmp_path / "sweep" / "0" / "metrics.json").stat().st_mtime_ns
    (tmp_path / "sweep" / "3" / "metrics.json").unlink()
    again = command("train", *given, "resume=true")
    assert again.code == 0 and again.terminal.count("is finished") == 3, again.terminal
    assert (tmp_path / "sweep" / "0" / "metrics.json").stat().st_mtime_ns == kept
    assert (tmp_path / "sweep" / "3" / "metrics.json").is_file()
    table = command(
        "compare", str(tmp_path / "sweep"), "metric=test/alignment_uniformity/text/alignment", f"output={tmp_path / 'out'}"
    )
    assert table.code == 0 and "less is better" in table.terminal, table.terminal
    (tmp_path / "sweep").rename(tmp_path / "lr=0.1,b")
    table = command("compare", str(tmp_path / "lr=0.1,b"), "metric=test/retrieval/text/mrr", f"output={tmp_path / 'out'}")
    assert table.code == 0, table.terminal
    assert (tmp_path / "out" / "comparison.txt").is_file()


@pytest.mark.slow
def test_a_budgeted_search_goes_on_until_its_trials_are_made(command, tmp_path):
    write_texts(tmp_path / "my.txt")
    few = [o for o in FAST if not o.startswith(("logger", "trainer.max_steps"))]
    given = ["-m", *tiny("data=text", f"data.path={tmp_path / 'my.txt'}", *few), "logger=none", "measure_before=false",
             "trainer.max_steps=4", "trainer.val_check_interval=1", "evaluation@validation=heldout", "sweep=optuna",
             "monitor=val/alignment_uniformity/text/uniformity", "optimized_metric=test/alignment_uniformity/text/alignment",
             "callback.embeddings=null", "hydra.sweeper.direction=minimize",
             f"hydra.sweep.dir='{tmp_path / 'a=b,(é'}'"]  # fmt: skip
    first = command("train", *given, "hydra.sweeper.trials=2")
    assert first.code == 0 and "0 of 2 trials are there" in first.terminal, first.terminal
    more = command("train", *given, "hydra.sweeper.trials=3", "model.pooling=choice(cls,mean)")
    assert more.code == 0 and "2 of 3 trials are there" in more.terminal, more.terminal
    assert "best of 3 trials" in more.terminal
    assert sorted(p.name for p in (tmp_path / "a=b,(é").iterdir() if p.name.isdigit()) == ["0", "1", "2"]
    study = optuna.load_study(study_name="sweep", storage=study_url(tmp_path / "a=b,(é" / "study.db"))
    rates = [trial.params["optimizer.lr"] for trial in study.trials]
    assert len(set(rates)) == 3 and all(1e-5 <= rate <= 1e-3 for rate in rates)
    assert [len(t.intermediate_values) for t in study.trials] == [4, 4, 4], "each validation is reported"
    none = command(
        "train", *[o for o in given if not o.startswith("optimized")], "optimized_metric=null", "hydra.sweeper.trials=4"
    )
    assert none.code == 1 and "optimized_metric, which is null" in none.terminal


@pytest.mark.slow
@pytest.mark.parametrize(
    ("send", "number", "code"),
    [
        (os.killpg, signal.SIGTERM, 143),
        (os.killpg, signal.SIGINT, 130),
        (os.kill, signal.SIGTERM, 143),
        (os.kill, signal.SIGKILL, -9),
    ],
    ids=["SIGTERM to the group", "Ctrl-C", "SIGTERM", "SIGKILL"],
)
def test_the_jobs_of_joblib_save_when_their_sweep_is_stopped(send, number, code, tmp_path):
    """Also the slower one, whose step ends seconds after the other's; a third process has no job, and would wait for one."""
    write_texts(tmp_path / "my.txt")
    few = [o for o in FAST if not o.startswith(("logger", "trainer.max_steps"))]
    given = ["-m", *tiny("data=text", "data.path=my.txt", *few), "logger=csv", "measure_before=false",
             "trainer.max_steps=1000000", "trainer.max_epochs=-1", "save_every=1000000",
             "trainer.enable_progress_bar=false", "callback.progress=null", "trainer.enable_model_summary=false",
             "hydra/launcher=joblib", f"hydra.launcher.n_jobs={2 if number == signal.SIGKILL else 3}",
             f"+callback.slow._target_={SlowSteps.__module__}.SlowSteps", "+callback.slow.seconds=0.1,5",
             "hydra.sweep.dir=sweep"]  # fmt: skip
    sweep = Forked(tmp_path, "train", given)
    sweep.wait_for(lambda: len(list(tmp_path.glob("sweep/*/stepping"))) == 2)
    jobs, before = descendants(sweep.pid), sweep.said()
    send(sweep.pid, number)
    assert sweep.end(90) == code, sweep.said()
    ends = time.monotonic() + 30  # where nobody waits for them
    while alive(jobs) and time.monotonic() < ends:
        time.sleep(0.2)
    assert not alive(jobs)
    saved = sorted(path.parts[-3] for path in tmp_path.glob("sweep/*/checkpoints/last.ckpt"))
    assert saved == ["0", "1"], sweep.said()
    lines = sweep.said().removeprefix(before).strip().splitlines()
    assert [line.split(";")[0] for line in lines] == (["stopped"] if number != signal.SIGKILL else []), lines


@pytest.mark.slow
def test_jobs_of_ray_are_those_of_one_process(command, tmp_path):
    pytest.importorskip("ray")
    write_texts(tmp_path / "my.txt")
    few = [o for o in FAST if not o.startswith("logger")]
    given = ["-m", *tiny("data=text", f"data.path={tmp_path / 'my.txt'}", *few), "logger=none", "measure_before=false",
             "seed=1", "data.batch_size=4,400"]  # fmt: skip
    for launcher in ("basic", "ray"):
        swept = command("train", *given, f"hydra/launcher={launcher}", f"hydra.sweep.dir={tmp_path / launcher}")
        assert swept.code == 1 and "job 1 failed" in swept.terminal, swept.terminal
        assert "data.batch_size=400" in (tmp_path / launcher / "1" / "error.txt").read_text()
    one, other = (read_metrics(tmp_path / launcher / "0") for launcher in ("basic", "ray"))
    assert {k: v for k, v in one.items() if k.startswith("test/")} == pytest.approx(
        {k: v for k, v in other.items() if k.startswith("test/")}
    )


@pytest.mark.slow
def test_sigterm_lets_the_jobs_of_ray_save_also_from_the_background(tmp_path):
    """A shell's background jobs ignore SIGINT and hand that down; it is what Ray cancels by."""
    pytest.importorskip("ray")
    write_texts(tmp_path / "my.txt")
    few = [o for o in FAST if not o.startswith(("logger", "trainer.max_steps"))]
    given = ["-m", *tiny("data=text", f"data.path={tmp_path / 'my.txt'}", *few), "logger=none", "measure_before=false",
             "trainer.max_steps=1000000", "trainer.max_epochs=-1", "save_every=1000000", "seed=1", "hydra/launcher=ray",
             f"hydra.sweep.dir={tmp_path / 'sweep'}"]  # fmt: skip
    ignore = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); os.execv(sys.executable, sys.argv[1:])"
    command = [sys.executable, "-c", ignore, sys.executable, "train.py", *given]
    sweep = subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert sweep.stdout is not None
    next(line for line in sweep.stdout if b"rows are" in line)
    time.sleep(10)  # its steps take milliseconds
    sweep.terminate()
    said = sweep.communicate(timeout=50)[0]  # not the minute after which jobs are left alone
    assert sweep.returncode == 143, said
    assert (tmp_path / "sweep" / "0" / "checkpoints" / "last.ckpt").is_file(), said


def test_without_ray_its_launcher_says_what_to_install(command, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    swept = command("train", "-m", "seed=1,2", "hydra/launcher=ray", f"hydra.sweep.dir={tmp_path / 'sweep'}")
    assert swept.code == 1 and "pip install 'tercet[ray]'" in swept.terminal, swept.terminal


def test_a_job_whose_process_died_is_named_and_the_sweep_goes_on(tmp_path, capsys):
    hydra = {"job": {"num": 3}, "sweep": {"dir": str(tmp_path), "subdir": "3"}, "overrides": {"task": ["seed=4"]}}
    result = lost_job_result(OmegaConf.create({"hydra": hydra}), RuntimeError("gone"))
    assert math.isnan(result.return_value) and result.overrides == ["seed=4"]
    written = (tmp_path / "3" / "error.txt").read_text()
    assert "job 3 was ended" in written and "resume=true" in written
    assert written in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a=b", "a,b", "(", "é", "a?b%20#c"])
def test_a_search_may_be_in_any_folder(tmp_path, name):
    file = tmp_path / name / "study.db"
    file.parent.mkdir()
    optuna.create_study(study_name="sweep", storage=study_url(file)).enqueue_trial({"x": 1})
    assert file.is_file() and len(list(tmp_path.rglob("*"))) == 2
    assert len(optuna.load_study(study_name="sweep", storage=study_url(file)).trials) == 1


def test_what_is_searched_is_what_was_written():
    def drawn(text):
        return to_distribution(*parse_overrides([text]))

    assert drawn("x=interval(1,2)") == FloatDistribution(1.0, 2.0)
    assert drawn("x=tag(log,interval(1e-5,1e-3))") == FloatDistribution(1e-5, 1e-3, log=True)
    assert drawn("x=choice(cls,mean)") == CategoricalDistribution(["cls", "mean"])
    assert drawn("x=1,2") == CategoricalDistribution(["1", "2"])
    assert drawn("x=choice('a=b','é (,')") == CategoricalDistribution(["'a=b'", "'é (,'"])
    assert drawn("x=range(1,4)") == CategoricalDistribution(["1", "2", "3"])
