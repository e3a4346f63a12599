"""Checkpoints are on the disk whole or not at all, and older ones serve where the newest cannot."""

import errno
import os
import shutil
import subprocess

import pytest
import torch

from tercet.errors import InputError
from tercet.models.folder import KEY, newest_checkpoint, read_checkpoint
from tercet.training.callbacks.checkpoints import LAST, AtomicCheckpointIO, RNGState, generations, interval


def content(step):
    return {KEY: {}, "global_step": step, "state_dict": {"w": torch.full((3,), float(step))}}


def steps(folder):
    return {path.name: read_checkpoint(path)["global_step"] for path in folder.iterdir()}


def test_the_last_k_stay(tmp_path):
    io = AtomicCheckpointIO(keep_last=3)
    for step in range(5):
        io.save_checkpoint(content(step), tmp_path / LAST)
    io.save_checkpoint(content(9), tmp_path / "best.ckpt")
    assert steps(tmp_path) == {LAST: 4, "last-1.ckpt": 3, "last-2.ckpt": 2, "best.ckpt": 9}


def test_one_is_one(tmp_path):
    for step in range(3):
        AtomicCheckpointIO(keep_last=1).save_checkpoint(content(step), tmp_path / LAST)
    assert steps(tmp_path) == {LAST: 2}


@pytest.mark.parametrize("moment", ["replace", "fsync"])
def test_a_failure_at_any_moment_leaves_the_old_one(tmp_path, monkeypatch, caplog, moment):
    AtomicCheckpointIO(keep_last=2).save_checkpoint(content(1), tmp_path / LAST)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace" if moment == "replace" else "os.fsync", full)
    AtomicCheckpointIO(keep_last=2).save_checkpoint(content(2), tmp_path / LAST)
    monkeypatch.undo()
    assert "No space left" in caplog.text
    assert steps(tmp_path)[LAST] == 1 and not list(tmp_path.glob(".*")), "nothing half written is left"


def test_a_truncated_one_is_named_and_the_one_before_is_used(tmp_path, caplog):
    for step in range(2):
        AtomicCheckpointIO(keep_last=2).save_checkpoint(content(step), tmp_path / LAST)
    whole = (tmp_path / LAST).read_bytes()
    (tmp_path / LAST).write_bytes(whole[: len(whole) // 2])
    there = generations(tmp_path, 2)
    assert newest_checkpoint(there) == tmp_path / "last-1.ckpt"
    said = caplog.text
    assert "last.ckpt cannot be read" in said and "last-1.ckpt, of step 0, is used" in said
    (tmp_path / "last-1.ckpt").write_bytes(b"")
    with pytest.raises(InputError, match=r"last\.ckpt cannot be read"):
        newest_checkpoint(there)
    assert newest_checkpoint([]) is None


def test_the_interval_is_steps_or_minutes():
    assert interval(200) == (200, None) and interval("200") == (200, None)
    assert interval("10m") == (None, 10.0) and interval("0.5 m") == (None, 0.5)
    assert interval(None) == (None, None)
    for wrong in ("10h", "soon", 0, "-5"):
        with pytest.raises(InputError, match="save_every="):
            interval(wrong)
    with pytest.raises(InputError, match="keep_last=0"):
        AtomicCheckpointIO(0)


def test_the_newest_is_that_of_the_latest_step_not_of_the_latest_time(tmp_path):
    for number, step in enumerate((5, 9, 7)):
        AtomicCheckpointIO(1).save_checkpoint(content(step), tmp_path / f"{number}.ckpt")
        os.utime(tmp_path / f"{number}.ckpt", (number, number))
    assert newest_checkpoint(sorted(tmp_path.iterdir())) == tmp_path / "1.ckpt"


def test_where_there_are_no_hard_links_older_ones_are_copies(tmp_path, monkeypatch, caplog):
    def refused(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("os.link", refused)
    for step in range(4):
        AtomicCheckpointIO(keep_last=3).save_checkpoint(content(step), tmp_path / LAST)
    assert steps(tmp_path) == {LAST: 3, "last-1.ckpt": 2, "last-2.ckpt": 1}
    assert not caplog.text


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=False)
    if not mounted or mounted.returncode:
        pytest.skip("a file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def large(step, kilobytes):
    return {**content(step), "weights": torch.zeros(kilobytes * 256)}


@pytest.mark.parametrize("first", [300, 100], ids=["known to be too large", "found to be"])
def test_a_full_disk_is_said_once_and_the_next_save_tries_again(small_disk, caplog, first):
    """Where the last one's size does not fit, nothing is written; else torch meets the end of the disk, and hides it."""
    io, file = AtomicCheckpointIO(keep_last=1), small_disk / LAST
    io.save_checkpoint(large(1, first), file)
    (small_disk / "other").write_bytes(bytes((1000 - first - 150) * 1024))
    for step in (2, 3):
        io.save_checkpoint(large(step, 300), file)
        assert steps_of(small_disk) == {LAST: 1}
    assert caplog.text.count("last.ckpt could not be written (No space left on device)") == 1
    (small_disk / "other").unlink()
    io.save_checkpoint(large(4, 300), file)
    assert steps_of(small_disk) == {LAST: 4}


def steps_of(folder):
    """And nothing but whole checkpoints is there."""
    return {path.name: read_checkpoint(path)["global_step"] for path in folder.iterdir() if path.name != "other"}


def test_an_error_of_another_kind_is_none_of_a_disk(tmp_path):
    with pytest.raises(Exception, match="pickle"):
        AtomicCheckpointIO().save_checkpoint({"f": lambda: None}, tmp_path / LAST)
    assert not list(tmp_path.iterdir())


def test_the_random_state_of_each_process_is_written_whole_or_left_out(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("tercet.training.callbacks.checkpoints.rank", lambda: 1)
    callback = RNGState()
    callback.file = tmp_path / "checkpoints" / "random-1.pt"
    callback.state = {"cpu": torch.get_rng_state(), "step": torch.tensor(3)}
    callback.state_dict()
    saved = callback.file.read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    assert callback.state_dict() is callback.state and "No space left" in caplog.text
    monkeypatch.undo()
    monkeypatch.setattr("tercet.training.callbacks.checkpoints.rank", lambda: 1)
    assert callback.file.read_bytes() == saved and len(list(callback.file.parent.iterdir())) == 1
    for torn in (saved, saved[:100], b""):
        callback.file.write_bytes(torn)
        callback.load_state_dict({"cpu": torch.get_rng_state(), "step": torch.tensor(4)})
        callback._restore()
    assert caplog.text.count("is not of this step") == 1 and "cannot be read" in caplog.text
