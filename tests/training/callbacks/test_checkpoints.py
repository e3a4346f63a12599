"""Checkpoints are on the disk whole or not at all, and older ones serve where the newest cannot."""

import errno

import pytest
import torch

from tercet.errors import InputError
from tercet.models.folder import KEY, read_checkpoint
from tercet.training.callbacks.checkpoints import LAST, AtomicCheckpointIO, interval, newest_checkpoint


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
    assert newest_checkpoint(tmp_path, read_checkpoint) == tmp_path / "last-1.ckpt"
    said = caplog.text
    assert "last.ckpt cannot be read" in said and "last-1.ckpt, is used" in said
    (tmp_path / "last-1.ckpt").write_bytes(b"")
    with pytest.raises(InputError, match=r"last-1\.ckpt cannot be read"):
        newest_checkpoint(tmp_path, read_checkpoint)
    assert newest_checkpoint(tmp_path / "none", read_checkpoint) is None


def test_the_interval_is_steps_or_minutes():
    assert interval(200) == (200, None) and interval("200") == (200, None)
    assert interval("10m") == (None, 10.0) and interval("0.5 m") == (None, 0.5)
    assert interval(None) == (None, None)
    for wrong in ("10h", "soon", 0, "-5"):
        with pytest.raises(InputError, match="save_every="):
            interval(wrong)
    with pytest.raises(InputError, match="keep_last=0"):
        AtomicCheckpointIO(0)
