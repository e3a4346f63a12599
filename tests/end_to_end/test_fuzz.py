"""A short run of ``benchmarks.fuzz``: damaged inputs end in one message of our own, and the run notices what does not."""

import os
from argparse import Namespace

import pytest

from benchmarks import fuzz
from benchmarks.fuzz_inputs import Case
from tests.conftest import composed


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    before = dict(os.environ)
    folder = tmp_path_factory.mktemp("good")
    fuzz.prepare(folder, trained=False)
    yield folder
    os.environ.clear()
    os.environ.update(before)
    composed("seed=0")  # its resolvers again


@pytest.mark.parametrize("kinds", [("tables", "suites", "vectors"), ("models", "runs", "images")], ids="-".join)
def test_damaged_inputs_are_explained(place, tmp_path, kinds, capsys):
    options = Namespace(inputs=20, start=0, seed=1, kinds=list(kinds), seconds=30, output=tmp_path)
    rows = fuzz.fuzz(options, place)
    assert sum(row["inputs"] for row in rows) == 20
    assert not any(row[fault] for row in rows for fault in fuzz.FAULTS), capsys.readouterr().out
    assert any(row["refused"] for row in rows) and any(row["accepted"] for row in rows)


FAULTY = {
    "unexplained": ("def run(cfg, output): {}['x']", "KeyError"),
    "signal": ("import os\ndef run(cfg, output): os.abort()", "SIGABRT"),
    "wrong exit code": ("import os\ndef run(cfg, output): os._exit(3)", "code 3"),
    "hang": ("def run(cfg, output):\n    while True: pass", ""),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTY)
def test_every_fault_is_noticed(place, tmp_path, monkeypatch, fault):
    code, where = FAULTY[fault]
    module = type(os)("tercet.app.commands.compare")
    exec(code, vars(module))
    monkeypatch.setitem(__import__("sys").modules, module.__name__, module)
    end = fuzz.Fuzzer(1, ["runs"], place, 1).run(Case("compare", (f"{place}/runs",)), place / "runs", debug=True)
    assert (end.fault, where in end.place) == (fault, True), end.output
