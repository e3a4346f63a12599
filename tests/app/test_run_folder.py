"""One run at a time has a folder; another run there is set aside; results are those of what was written."""

import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch

from tercet.app import run_folder
from tercet.app.commands import train
from tercet.app.run_folder import LOCK, MOVING, holds_run, locked, set_aside
from tercet.errors import InputError
from tercet.models.folder import KEY
from tercet.training.callbacks.evaluation import Evaluation
from tests.test_paths import names


@pytest.fixture
def quick(monkeypatch):
    """Locks that are old after 0.6 seconds, for processes that renew none: on a busy machine one may miss that."""
    monkeypatch.setattr(run_folder, "LEASE_SECONDS", 0.6)


def holder(folder):
    """A process that holds the folder for a minute, or until SIGUSR1 lets it go on."""
    if not (child := os.fork()):
        code = 99
        try:
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
            with locked(folder):
                signal.sigtimedwait([signal.SIGUSR1], 60)
                code = 0
        finally:
            os._exit(code)
    ends = time.monotonic() + 60
    while not ((folder / LOCK).is_file() and "host=" in (folder / LOCK).read_text()) and time.monotonic() < ends:
        time.sleep(0.01)
    return child


def stop(child):
    """Suspend a child, and wait until it is."""
    os.kill(child, signal.SIGSTOP)
    assert os.WIFSTOPPED(os.waitpid(child, os.WUNTRACED)[1])


def end(child):
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_two_runs_at_once_are_refused_and_the_owner_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_folder, "WAIT_SECONDS", 1.5)
    child = holder(tmp_path)
    try:
        with pytest.raises(InputError, match=rf"is in use by process {child} on \w+.*use another output_dir"), locked(tmp_path):
            pass
        assert "waiting up to 2 seconds" in capsys.readouterr().err
    finally:
        end(child)


def test_a_run_that_is_ending_is_waited_for(tmp_path, monkeypatch):
    child, said = holder(tmp_path), []
    monkeypatch.setattr(run_folder, "print_status", lambda text: said.append(text) or os.kill(child, signal.SIGUSR1))
    with locked(tmp_path):
        assert len(said) == 1 and f"in use by process {child}" in said[0]
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert not names(tmp_path)


def test_the_lock_of_a_dead_process_is_taken_over_at_once(tmp_path, capsys):
    end(holder(tmp_path))
    assert names(tmp_path) == [LOCK]
    begun = time.monotonic()
    with locked(tmp_path):
        assert time.monotonic() - begun < 20
    assert not capsys.readouterr().err


def test_the_lock_of_another_machine_is_taken_over_when_it_is_old(tmp_path, quick):
    end(holder(tmp_path))
    marker = (tmp_path / LOCK).read_text()
    host = next(line for line in marker.splitlines() if line.startswith("host="))
    (tmp_path / LOCK).write_text(marker.replace(host, "host=elsewhere"))
    begun = time.monotonic()
    with locked(tmp_path):
        assert time.monotonic() - begun > 0.6


def test_a_suspended_run_whose_folder_was_taken_writes_no_more(tmp_path, quick):
    child = holder(tmp_path)
    stop(child)
    with locked(tmp_path):
        os.kill(child, signal.SIGCONT)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


def test_other_processes_of_the_run_do_not_lock(tmp_path, monkeypatch):
    with locked(tmp_path):
        for name in ("RANK", "SLURM_PROCID"):
            monkeypatch.setenv(name, "1")
            with locked(tmp_path):
                assert names(tmp_path) == [LOCK]
            monkeypatch.delenv(name)


def test_a_run_is_set_aside_whole(tmp_path):
    assert not holds_run(tmp_path)
    for number in (1, 2):
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints" / "last.ckpt").write_text(str(number))
        (tmp_path / "config.yaml").write_text("")
        assert holds_run(tmp_path)
        set_aside(tmp_path)
        assert not holds_run(tmp_path) and len(names(tmp_path)) == number
        assert (tmp_path / f"before-{number}" / "checkpoints" / "last.ckpt").read_text() == str(number)


def test_a_run_whose_setting_aside_was_cut_off_is_moved_on(tmp_path):
    (tmp_path / MOVING).mkdir()
    (tmp_path / MOVING / "checkpoints").mkdir()
    (tmp_path / "metrics.json").write_text("{}")
    with locked(tmp_path):
        assert names(tmp_path) == [LOCK, "before-1"] and names(tmp_path / "before-1") == ["checkpoints", "metrics.json"]


def test_the_best_checkpoint_counts_as_what_was_written(tmp_path, monkeypatch, capsys):
    """Where a disk was full, the file is that of an earlier validation, or there is none."""
    path, loaded = tmp_path / "best.ckpt", []
    best = SimpleNamespace(monitor="val/x", mode="max", best_model_score=0.75, best_model_path=str(path), state_key="best")
    trainer = SimpleNamespace(checkpoint_callback=best, callback_metrics={"train/loss": 1.0, "val/x": 0.25})
    monkeypatch.setattr(train, "load_state", lambda _, weights: loaded.append(weights))
    assert train.restore_best(trainer, None, Evaluation()) == {"train/loss": 1.0, "val/x": 0.25}
    assert not loaded and "best.ckpt, the best by val/x, is not there" in capsys.readouterr().err
    for score, said in ((0.75, ""), (0.5, "The checkpoint of val/x 0.7500 could not be written")):
        torch.save({KEY: {}, "state_dict": {}, "callbacks": {"best": {"best_model_score": torch.tensor(score)}}}, path)
        assert train.restore_best(trainer, None, Evaluation()) == {"train/loss": 1.0, "val/x": score}
        assert said in capsys.readouterr().err and len(loaded) == (1 if score == 0.75 else 2)
