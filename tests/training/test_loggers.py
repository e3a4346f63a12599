"""metrics.csv loses nothing by a full disk, nor by a second part of a run."""

import csv
import resource

import pytest

from tercet.training.loggers import AtomicCSVLogger


def rows(path):
    with (path / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def logger(path, keep=False):
    return AtomicCSVLogger(str(path), name="", version="", prefix="", flush_logs_every_n_steps=1000, keep_earlier=keep)


@pytest.fixture
def full_disk():
    """``full_disk(n)``: no file of this process may grow beyond ``n`` bytes; the kernel says so as of a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda n: resource.setrlimit(resource.RLIMIT_FSIZE, (n, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_said_and_the_rows_come_later(tmp_path, full_disk, caplog):
    curves = logger(tmp_path)
    curves.log_metrics({"a": 1.0}, 0)
    curves.save()
    before = (tmp_path / "metrics.csv").read_bytes()
    full_disk(len(before))
    for step in range(1, 4):
        curves.log_metrics({"a": 2.0, "b": float(step)}, step)
        curves.save()
    full_disk(resource.RLIM_INFINITY)
    assert (tmp_path / "metrics.csv").read_bytes() == before, "as it was, to the byte"
    assert caplog.text.count("could not be written") == 1 and not list(tmp_path.glob(".*"))
    curves.finalize("success")
    found = rows(tmp_path)
    assert [(row["step"], row["a"], row["b"]) for row in found] == [
        ("0", "1.0", ""), ("1", "2.0", "1.0"), ("2", "2.0", "2.0"), ("3", "2.0", "3.0"),
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
@pytest.mark.parametrize("keep", [True, False])
def test_a_run_that_goes_on_keeps_what_was_before(tmp_path, keep):
    """Its rows up to the step that is made again, and the columns of both parts; a run that begins anew keeps nothing."""
    first = logger(tmp_path)
    for step in range(3):
        first.log_metrics({"a": 1.0, "b": float(step)}, step)
    first.save()
    logger(tmp_path, keep).save()  # killed before it wrote anything
    second = logger(tmp_path, keep)
    for step in (2, 3):
        second.log_metrics({"b": 10.0 + step, "c": 4.0}, step)
        second.save()
    found = [(row["step"], row.get("a"), row["b"], row["c"]) for row in rows(tmp_path)]
    new = [("2", "" if keep else None, "12.0", "4.0"), ("3", "" if keep else None, "13.0", "4.0")]
    assert found == ([("0", "1.0", "0.0", ""), ("1", "1.0", "1.0", "")] if keep else []) + new
