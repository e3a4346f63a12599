"""The list of runs: their states, its cache, and the command ``runs``."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tercet.app import run_list
from tercet.app.commands import runs as runs_command
from tercet.app.run_files import ERROR, LEASE_SECONDS, LOCK, find_runs, is_alive, read_curves
from tercet.app.run_folder import locked
from tercet.app.run_list import best_runs, differences, find_run, list_runs, remove_run
from tercet.errors import InputError
from tests.app.test_run_folder import end, holder, stop
from tests.conftest import composed
from tests.end_to_end.conftest import command  # noqa: F401 - a fixture

CURVES = "epoch,lr,step,train/loss\n0,0.5,1,2.0\n0,,2,1.5\n,0.25,3,\n"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TERCET_CACHE", str(tmp_path_factory.mktemp("cache")))


def lay(folder, metrics=None, typed=(), **settings):
    """A run as `tercet train` leaves it, but for its model; without ``metrics`` it has not finished."""
    (folder / "checkpoints").mkdir(parents=True)
    content = {"command": list(typed), "seed": 1, "name": "quickstart", "optimized_metric": None, "expected": {},
               "output_dir": str(folder), "smaller_is_better": ["loss", "alignment"], "run": "abc", **settings}  # fmt: skip
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(content))
    (folder / "checkpoints" / "last.ckpt").write_bytes(b"x" * 1000)
    (folder / "metrics.csv").write_text(CURVES)
    if metrics is not None:
        (folder / "metrics.json").write_text(json.dumps({**metrics, "run": "abc"}))
    return folder


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    """A run of each kind of end, and a sweep of three jobs."""
    monkeypatch.chdir(tmp_path)
    root = Path("outputs")
    lay(root / "a" / "finished-1", {"test/mrr": 0.5, "test/loss": 2.0, "before/mrr": 0.25}, ["loss.temperature=0.1"])
    lay(root / "a" / "stopped-1", typed=["data=text"])
    (lay(root / "a" / "failed-1") / ERROR).write_text("no memory\n")
    for i in range(3):
        lay(
            root / "multirun" / "a" / "s1" / str(i),
            {"test/mrr": i / 10, "test/loss": i / 10},
            [f"seed={i}"],
            seed=i,
            name="swept",
        )
    return root


def states(folder):
    return {run.folder.name: run.state for run in list_runs(folder)}


def test_the_states_of_runs_that_have_ended(outputs):
    assert states(outputs) == {
        "finished-1": "finished", "stopped-1": "stopped", "failed-1": "failed", **dict.fromkeys("012", "finished"),
    }  # fmt: skip
    found = {run.folder.name: run for run in list_runs(outputs)}
    assert found["failed-1"].error == "no memory" and found["finished-1"].error == ""
    assert found["finished-1"].metrics == {"test/mrr": 0.5, "test/loss": 2.0, "before/mrr": 0.25}
    assert found["finished-1"].main_metric == "test/mrr" and found["finished-1"].command == ("loss.temperature=0.1",)
    assert found["2"].sweep == outputs / "multirun" / "a" / "s1" and found["2"].seed == 2 and found["stopped-1"].sweep is None


def test_a_run_is_running_while_it_holds_its_folder_and_dead_when_it_was_killed(outputs):
    folder = outputs / "a" / "stopped-1"
    child = holder(folder)
    try:
        assert states(outputs)["stopped-1"] == "running"
        stop(child)
        assert is_alive(folder), "until its lock has not been renewed for so long"
        os.utime(folder / LOCK, (time.time() - 2 * LEASE_SECONDS,) * 2)
        assert is_alive(folder) is False
        with pytest.raises(InputError, match="in use by a process that runs"):  # it may go on
            remove_run(find_run("stopped-1"), outputs)
    finally:
        end(child)
    assert states(outputs)["stopped-1"] == "dead" and (folder / "config.yaml").is_file()


def test_the_process_of_another_machine_or_boot(outputs):
    folder = outputs / "a" / "stopped-1"
    end(holder(folder))
    marker = (folder / LOCK).read_text()
    fields = dict(line.partition("=")[::2] for line in marker.splitlines())
    (folder / LOCK).write_text(marker.replace(f"host={fields['host']}", "host=elsewhere"))
    assert states(outputs)["stopped-1"] == "running", "nobody here can tell, until its lock is old"
    os.utime(folder / LOCK, (time.time() - 60,) * 2)
    assert states(outputs)["stopped-1"] == "dead"
    booted = str(int(fields["start"]) ^ (1 << 64))
    own = marker.replace(f"pid={fields['pid']}", f"pid={os.getpid()}")
    (folder / LOCK).write_text(own)
    assert states(outputs)["stopped-1"] == "running"
    (folder / LOCK).write_text(own.replace(f"start={fields['start']}", f"start={booted}"))
    assert states(outputs)["stopped-1"] == "dead"


def test_what_fails_leaves_its_message_and_what_is_stopped_none(outputs):
    folder = outputs / "a" / "failed-1"
    for error, state in (
        (InputError("`margin`=9: too large"), "failed"),
        (SystemExit(143), "stopped"),
        (KeyboardInterrupt(), "stopped"),
    ):
        with pytest.raises(type(error)), locked(folder):
            assert not (folder / ERROR).exists(), "that of an earlier start"
            raise error
        assert states(outputs)["failed-1"] == state
    with pytest.raises(ValueError, match="1"), locked(folder.parent / "new"):
        raise ValueError(1)
    assert not list((folder.parent / "new").iterdir()), "nothing had begun"


def test_a_second_look_reads_what_has_changed_only(tmp_path, monkeypatch):
    for i in range(40):
        lay(tmp_path / "outputs" / f"run-{i}", {"test/mrr": i / 100})
    read = []
    original = run_list._read
    monkeypatch.setattr(run_list, "_read", lambda path: read.append(path.name) or original(path))
    monkeypatch.chdir(tmp_path)
    first = list_runs()
    assert len(read) == len(first) == 40
    read.clear()
    assert list_runs() == first and not read
    (tmp_path / "outputs" / "run-7" / "metrics.json").write_text('{"test/mrr": 0.75, "run": "abc"}')
    (tmp_path / "outputs" / "run-8" / "metrics.json").unlink()
    lay(tmp_path / "outputs" / "run-40")
    changed = {run.folder.name: run for run in list_runs()}
    assert sorted(read) == ["run-40", "run-7", "run-8"]
    assert changed["run-7"].metrics == {"test/mrr": 0.75} and changed["run-8"].state == "stopped"
    for damage in ("", "[]", '{"version": 1}', '{"version": 0, "runs": {}}'):
        read.clear()
        (cache,) = (Path(os.environ["TERCET_CACHE"]) / "runs").glob("*.json")
        cache.write_text(damage)
        assert len(list_runs()) == 41 and len(read) == 41
    cache.unlink()
    cache.mkdir()  # what cannot be written
    assert len(list_runs()) == 41


@pytest.mark.slow
def test_five_thousand_runs_are_listed_in_a_second(tmp_path):
    """Processor time, as other processes may run; the settings are those of a real run."""
    settings = OmegaConf.to_yaml(composed(), resolve=True)
    metrics = json.dumps({**{f"{stage}/mrr{i}": 0.5 for stage in ("before", "test") for i in range(15)}, "run": "abc"})
    for i in range(5000):
        folder = tmp_path / "outputs" / (f"multirun/{i // 50}/{i}" if i % 2 else f"run-{i}")
        (folder / "model").mkdir(parents=True)
        (folder / "config.yaml").write_text(settings + "run: abc\n")
        (folder / "metrics.json").write_text(metrics)
        (folder / "metrics.csv").write_text(CURVES)
    assert len(list_runs(tmp_path / "outputs")) == 5000
    begun = time.process_time()
    assert len(list_runs(tmp_path / "outputs")) == 5000
    assert time.process_time() - begun < 1.0


def test_damaged_files_of_a_run_are_its_error(outputs):
    (outputs / "a" / "finished-1" / "metrics.json").write_text("{")
    (outputs / "a" / "stopped-1" / "config.yaml").write_text("command: &a [*a]\n")
    found = {run.folder.name: run for run in list_runs(outputs)}
    assert "metrics.json is cut or not JSON" in found["finished-1"].error and found["finished-1"].state == "failed"
    assert "anchors and aliases are not accepted" in found["stopped-1"].error


def test_runs_are_found_where_a_run_is_not(tmp_path):
    lay(tmp_path / "run" / "1_stage")
    (tmp_path / "run" / LOCK).touch()  # a run of stages, which has no settings before its end
    (tmp_path / "link").symlink_to(tmp_path / "run")
    (tmp_path / "other" / "model").mkdir(parents=True)
    assert find_runs([tmp_path], ("config.yaml", LOCK)) == [tmp_path / "run"]
    assert find_runs([tmp_path, tmp_path / "run"]) == [tmp_path / "run" / "1_stage"]


def test_the_best_run_by_what_its_evaluators_declare(outputs):
    runs = list_runs(outputs)
    assert [run.metrics["test/mrr"] for run in best_runs(runs, "test/mrr")] == [0.5, 0.2, 0.1, 0.0]
    assert [run.metrics["test/loss"] for run in best_runs(runs, "test/loss")] == [0.0, 0.1, 0.2, 2.0]
    lay(outputs / "a" / "nan", {"test/mrr": float("nan")})
    assert len(best_runs(list_runs(outputs), "test/mrr")) == 4
    with pytest.raises(InputError, match=r"metric=test/mr is in none .* There are: before/mrr, test/loss, test/mrr"):
        best_runs(runs, "test/mr")


def test_a_run_by_its_id_or_path(outputs):
    for name in (
        "finished-1",
        "fin",
        "a/finished-1",
        "outputs/a/finished-1",
        "s1/2",
        str(Path("outputs/a/finished-1").resolve()),
    ):
        assert find_run(name).state == "finished", name
    with pytest.raises(InputError, match="no run of this path or id"):
        find_run("x")
    lay(outputs / "a" / "finished-2")
    with pytest.raises(InputError, match=r"fin may be any of 2 runs .*Give more"):
        find_run("fin")


def test_differences_of_settings_and_metrics(outputs):
    lay(outputs / "a" / "other", {"test/mrr": 0.75}, seed=2, optimizer={"lr": 0.1}, only=True)
    found = differences(find_run("finished-1"), find_run("other"))
    assert ("seed", 1, 2) in found and ("optimizer.lr", None, 0.1) in found and ("test/mrr", 0.5, 0.75) in found
    assert not {name for name, *_ in found} & {"command", "run", "output_dir", "name"}


def test_curves_of_a_run(outputs):
    assert read_curves(outputs / "a" / "finished-1") == {
        "epoch": [(1.0, 0.0), (2.0, 0.0)], "lr": [(1.0, 0.5), (3.0, 0.25)], "train/loss": [(1.0, 2.0), (2.0, 1.5)],
    }  # fmt: skip
    assert read_curves(outputs) == {}


@pytest.fixture
def runs(command, outputs, monkeypatch):  # noqa: F811
    """``runs(*arguments) -> Result``: the command, beside ``outputs``."""
    return lambda *arguments: command("runs", *arguments)


def lines(result):
    assert result.code == 0, result.terminal
    return [line.split() for line in result.terminal.splitlines()]


def test_the_command_lists_and_compares(runs, outputs):
    listed = lines(runs())
    assert [row[-3:] for row in listed if "multirun" in str(row)] == [["0.1000", "±", "0.1000"]] and "3 finished" in " ".join(
        listed[1]
    )
    assert listed[-1][:2] == ["6", "runs:"] and "4 finished, 1 stopped, 1 failed" in " ".join(listed[-1])
    assert len(lines(runs("list", "jobs=true", "run_name=swept"))) == 5
    failed = lines(runs("list", "state=failed"))[1]
    assert (failed[0], failed[-2:]) == ("failed", ["no", "memory"])
    best = lines(runs("best", "metric=test/mrr", "last=1"))
    assert best[1] == ["0.5000", "outputs/a/finished-1", "1", "loss.temperature=0.1"] and len(best) == 2
    shown = runs("show", "finished-1").terminal
    assert "tercet train loss.temperature=0.1" in shown and ["mrr", "0.5", "0.25"] in lines(runs("show", "finished-1"))
    assert ["test/mrr", "0.2", "0.1"] in lines(runs("diff", "s1/2", "s1/1"))
    tail = runs("tail", "finished-1", "last=2").terminal.splitlines()
    assert tail == ["step 2  epoch 0  train/loss 1.5", "step 3  lr 0.25", "outputs/a/finished-1 is finished"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lst"], "runs lst: choose one of list, .*Did you mean list"),
        (["diff", "a"], "runs diff takes two runs, not 1 names: a"),
        (["list", "state=[dead,x]"], "state=x: choose some of running"),
        (["best"], "metric must be given"),
        (["list", "folder=nowhere"], "folder=nowhere: there is no such folder"),
        (["list", "lst=3"], "lst.*Did you mean last|last"),
        (["prune", "older_than=x"], "older_than=x"),
        (["list", "last=x"], "last=x"),
    ],
)
def test_what_the_command_refuses(runs, arguments, message):
    result = runs(*arguments)
    assert result.code == 1
    assert re.search(message, result.terminal), result.terminal


def test_prune_shows_first_and_deletes_what_it_may(runs, outputs, tmp_path):
    stranger = lay(tmp_path / "elsewhere" / "run")
    (outputs / "a" / "failed-1" / "link").symlink_to(stranger)
    shown = runs("prune")
    assert "1 runs, " in shown.terminal and "Nothing was deleted" in shown.terminal and "failed-1" in shown.terminal
    assert (outputs / "a" / "failed-1").is_dir()
    size = run_list.folder_size(outputs / "a" / "failed-1")
    deleted = runs("prune", "--yes")
    assert f"1 runs deleted, {size:,} bytes freed." in deleted.terminal and not (outputs / "a" / "failed-1").exists()
    assert (stranger / "config.yaml").is_file() and (stranger / "checkpoints" / "last.ckpt").is_file()
    assert "0 runs, 0 bytes" in runs("prune", "state=[stopped]", "older_than=1").terminal
    assert "3 runs deleted" in runs("prune", "state=finished", "run_name=swept", "yes=true").terminal
    assert not (outputs / "multirun").exists() and (outputs / "a" / "stopped-1").is_dir()


def test_prune_keeps_what_runs_what_is_outside_and_what_is_no_run(runs, outputs, tmp_path):
    (outputs / "notes").mkdir()
    (outputs / "notes" / "error.txt").write_text("mine")
    (outputs / "notes" / "thesis.tex").write_text("mine")
    child = holder(outputs / "a" / "stopped-1")
    try:
        result = runs("prune", "--yes")
        assert result.code == 1 and "outputs/notes has no settings of a run of Tercet; it is kept" in result.terminal
        assert "1 runs deleted" in result.terminal and (outputs / "notes" / "thesis.tex").is_file()
        assert "a running run is never deleted" in runs("prune", "state=running", "--yes").terminal
        assert (outputs / "a" / "stopped-1" / "config.yaml").is_file()
    finally:
        end(child)
    assert list_runs(outputs)
    with pytest.raises(InputError, match="is not below"):
        remove_run(find_run(str(lay(tmp_path / "elsewhere" / "run"))), outputs)
    with pytest.raises(InputError, match="is not below"):
        remove_run(find_run("finished-1"), outputs / "a" / "finished-1")
    assert "1 runs deleted" in runs("prune", "state=dead", "--yes").terminal and not (outputs / "a" / "stopped-1").exists()


def test_tail_follows_a_run_until_it_ends(runs, outputs, monkeypatch):
    folder, rounds = outputs / "a" / "stopped-1", []

    def next_row(_):
        rounds.append(len(rounds) + 4)
        with (folder / "metrics.csv").open("a") as file:
            file.write(f",,{rounds[-1]},1.0\n")

    monkeypatch.setattr(runs_command, "is_alive", lambda _: len(rounds) < 3)
    monkeypatch.setattr(runs_command, "time", type("Clock", (), {"sleep": staticmethod(next_row)}))
    assert runs("tail", "stopped-1", "last=1").terminal.splitlines() == [
        "step 3  lr 0.25", *(f"step {i}  train/loss 1" for i in (4, 5, 6)), "outputs/a/stopped-1 is stopped",
    ]  # fmt: skip


def test_the_list_imports_nothing_heavy():
    program = "import sys, tercet.app.cli, tercet.app.commands.runs; print({'torch', 'numpy', 'scipy'} & sys.modules.keys())"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "set()"
