"""Files are written whole or not at all."""

import errno
import os
import resource
import signal
from pathlib import Path

import pytest

from tercet.paths import atomic_folder, atomic_write, check_writable, remove_partials, temporary_folder


def in_child(work):
    """Run ``work`` in a forked process; its exit code."""
    if not (child := os.fork()):
        code = 99
        try:
            code = work() or 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text("old")
    with atomic_write(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old" and partial.parent == tmp_path and partial.suffix == ".json"
    assert path.read_text() == "new" and names(tmp_path) == ["metrics.json"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_permissions_are_those_of_any_new_file(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with atomic_write(tmp_path / "a") as partial:
            partial.write_text("a")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, error):
    (tmp_path / "a").write_text("old")
    with pytest.raises(error), atomic_write(tmp_path / "a") as partial:
        partial.write_text("half")
        raise error
    assert (tmp_path / "a").read_text() == "old" and names(tmp_path) == ["a"]


def test_what_does_not_fit_leaves_the_old_file_and_names_it(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")

    def write():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            with atomic_write(path) as partial:
                partial.write_bytes(b"x" * 5000)
        except OSError as error:
            return 7 if error.errno == errno.EFBIG and str(path) in str(error) else 8

    assert in_child(write) == 7
    assert path.read_text() == "old" and names(tmp_path) == ["a"]


def test_a_folder_that_is_not_there_is_named_not_a_temporary_file(tmp_path):
    with pytest.raises(FileNotFoundError) as error, atomic_write(tmp_path / "none" / "a.json"):
        pass
    assert error.value.filename == str(tmp_path / "none" / "a.json")


def test_the_file_and_then_its_folder_are_synced(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("os.fsync", lambda handle: synced.append(os.readlink(f"/proc/self/fd/{handle}")))
    with atomic_write(tmp_path / "a") as partial:
        partial.write_text("a")
    assert synced == [str(partial), str(tmp_path)]


def test_a_folder_appears_whole_and_keeps_what_it_had(tmp_path):
    model = tmp_path / "model"
    with atomic_folder(model) as made:
        (made / "inner").mkdir()
        (made / "inner" / "a").write_text("1")
        assert not model.exists()
    (model / "README").write_text("mine")
    with pytest.raises(ValueError, match="half"), atomic_folder(model) as made:
        (made / "b").write_text("2")
        raise ValueError("half")
    assert names(model) == ["README", "inner"]
    with atomic_folder(model) as made:
        (made / "inner").mkdir()
        (made / "inner" / "a").write_text("3")
    assert names(model) == ["README", "inner"] and (model / "inner" / "a").read_text() == "3"
    assert names(tmp_path) == ["model"]


def test_what_a_killed_process_left_is_removed_and_what_is_being_written_is_not(tmp_path):
    def killed():
        with atomic_write(tmp_path / "a.npz"), temporary_folder(tmp_path) as folder:
            (folder / "rows").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(killed) == -signal.SIGKILL and len(names(tmp_path)) == 2
    with atomic_write(tmp_path / "b"):
        remove_partials(tmp_path)
        assert len(names(tmp_path)) == 1
    assert names(tmp_path) == ["b"]


def test_a_folder_is_writable_while_another_process_clears_it(tmp_path, monkeypatch):
    touch = Path.touch

    def touched_and_cleared(path):
        touch(path)
        remove_partials(tmp_path)

    monkeypatch.setattr(Path, "touch", touched_and_cleared)
    check_writable(tmp_path, "cache")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("make", ["touch", "mkdir"])
def test_what_another_process_clears_before_it_is_locked_is_made_again(make, tmp_path, monkeypatch):
    original, calls = getattr(Path, make), []

    def made_and_cleared(path):
        original(path)
        calls.append(path)
        if len(calls) < 3:
            remove_partials(tmp_path)

    monkeypatch.setattr(Path, make, made_and_cleared)
    with atomic_write(tmp_path / "a") if make == "touch" else temporary_folder(tmp_path) as partial:
        assert partial == calls[2] and partial.exists()
        remove_partials(tmp_path)
        assert partial.exists()
    assert names(tmp_path) == (["a"] if make == "touch" else [])
