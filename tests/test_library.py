"""The code of docs/library.md runs as printed."""

import re
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn.functional import normalize

from tercet.models.folder import save_model
from tests.conftest import CONF, TEXTS

BLOCKS = re.findall(r"^```python\n(.*?)^```", (CONF.parent / "docs" / "library.md").read_text(), re.DOTALL | re.MULTILINE)


def block(start):
    """The block that holds this text."""
    (found,) = (b for b in BLOCKS if start in b)
    return found


def same_and_others(values):
    """Mean squared distance of rows of one label, and of all others."""
    z, labels = normalize(values["model"](values["x"]).detach(), dim=1), values["labels"]
    distance, same = 2 - 2 * z @ z.T, labels[:, None] == labels
    return float(distance[same].mean()), float(distance[~same].mean())


def test_the_loop_is_short_and_learns():
    code = block("for step in")
    assert code.count("\n") <= 15
    before, after = {}, {}
    exec(code.replace("range(50)", "range(1)"), before)
    torch.manual_seed(0)
    exec(code, after)
    (same, others), (first_same, first_others) = same_and_others(after), same_and_others(before)
    assert same / others < 0.8 * first_same / first_others


@pytest.mark.parametrize("start", ["hard_negatives", "mine(", "negatives ="])
def test_the_short_examples_run(start):
    for code in [b for b in BLOCKS if start in b]:
        exec(code, {"torch": torch, "tercet": __import__("tercet")})


@pytest.mark.slow
def test_the_loop_runs_in_two_processes(tmp_path):
    loop = block("for step in").replace("for step in", block("init_process") + "for step in")
    (tmp_path / "train.py").write_text(loop + block("_exit"))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "train.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout.count("loss ")) == (0, 2), done.stderr


def test_models_and_evaluators(encoder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_model(encoder, "model")
    n, tasks = len(TEXTS), ["STS12", "STS13", "STS14", "STS15", "STS16", "STS-B", "SICK-R"]
    row = {
        "subset": "a",
        "split": "test",
        "sentence1": TEXTS,
        "sentence2": TEXTS[1:] + TEXTS[:1],
        "score": [*map(float, range(n))],
    }
    table = [
        {"task": task, **{k: v if isinstance(v, str) else v[i] for k, v in row.items()}} for task in tasks for i in range(n)
    ]
    pq.write_table(pa.Table.from_pylist(table), "sts.parquet")
    values = {"torch": torch, "tercet": __import__("tercet")}
    for start in ("tercet.load", "model.train()", "STS("):
        exec(block(start), values)
    assert values["z"].shape[0] == 2 * 2 and float(values["value"]) > 0
    assert "sts/" in capsys.readouterr().out
