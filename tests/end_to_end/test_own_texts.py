"""One line for one's own texts: the objective, the number of steps and the selection come from the data."""

import csv
from collections import Counter

import pytest
import torch
from omegaconf import OmegaConf

from tercet.data import TextFiles
from tercet.models.folder import load_folder
from tests.conftest import TEXTS, tiny
from tests.end_to_end.conftest import FAST

OWN = [o for o in FAST if not o.startswith(("selection", "trainer.max_steps"))]


@pytest.fixture
def table(tmp_path):
    """Forty rows of two texts and a label."""
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        rows = [(f"{a} {b}", f"{b} {a}", i) for a in TEXTS[:8] for i, b in enumerate(TEXTS[:5])]
        csv.writer(file).writerows([("q", "a", "kind"), *rows])
    return path


@pytest.fixture
def train(command, table):
    return lambda *more: command("train", *tiny("data=text", f"data.path={table}", *OWN, *more))


def test_pairs_that_training_spoils_keep_the_start(train):
    """Also where the run was stopped and resumed: the start is not measured again."""
    spoil = ["data.columns=[q,a]", "optimizer.lr=0.5", "scheduler=constant", "save_every=1"]
    result = train(*spoil, "trainer.max_steps=2")
    assert result.code == 0, result.terminal
    assert "objective=simcse_sup selection=retrieval, by the text columns: q, a" in result.terminal
    start = (result.output / "checkpoints" / "start.ckpt").stat().st_mtime_ns
    result = train(*spoil, "trainer.max_steps=4", "resume=true")
    assert result.code == 0 and "resuming" in result.terminal, result.terminal
    assert "Nothing beat the start" in result.terminal
    assert (result.output / "checkpoints" / "start.ckpt").stat().st_mtime_ns == start
    metrics = result.metrics()
    before = {name: x for name, x in metrics.items() if name.startswith("before/")}
    assert before == {name.replace("test/", "before/"): x for name, x in metrics.items() if name.startswith("test/")}
    weights = torch.load(result.output / "checkpoints" / "start.ckpt", weights_only=True)["state_dict"]
    for name, x in load_folder(str(result.output / "model"))[0].state_dict().items():
        assert torch.equal(x, weights[f"encoder.{name}"]), name
    config = OmegaConf.load(result.output / "config.yaml")
    assert (config.trainer.max_steps, config.trainer.val_check_interval, config.data.validation_rows) == (4, 1, 500)


def test_labels_are_learned_by_triplets_for_as_long_as_their_rows_ask(train, monkeypatch):
    read, rows_of = Counter(), TextFiles.rows
    monkeypatch.setattr(TextFiles, "rows", lambda source: read.update([source.split]) or rows_of(source))
    result = train("data.columns=[q]", "data.label=kind", "run_length.epochs=2", "data.batch_size=10")
    assert result.code == 0, result.terminal
    assert read["train"] == 1
    assert "objective=facenet selection=nearest_neighbor" in result.terminal
    assert "4 steps of 10 rows, 1.5 passes over 26 training rows" in result.terminal
    rows = csv.DictReader((result.output / "metrics.csv").open())
    assert {row["step"] for row in rows if row["val/nearest_neighbor/text/map@r"]} == {"0", "1", "2", "3"}
    assert "val/nearest_neighbor/text/map@r" in result.metrics()


def test_an_objective_and_a_selection_that_are_named_are_kept(train):
    result = train("data.columns=[q,a]", "objective=simcse_unsup", "selection=none", "run_length.epochs=0.1")
    assert result.code == 0 and "by the text columns" not in result.terminal, result.terminal
    assert OmegaConf.load(result.output / "config.yaml").objective._target_.endswith("SimCSEUnsup")
    assert not (result.output / "checkpoints" / "start.ckpt").exists()


def test_fewer_rows_than_a_batch_are_one_batch(command, tmp_path):
    """Unless the command says how large a batch is; what is tokenized is said in lines, not by a bar."""
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("q", "a"), *((text, text[::-1]) for text in TEXTS[:8])])
    own = [o for o in OWN if not o.startswith("data.batch_size")]
    few = tiny("data=text", f"data.path={path}", *own, "data.columns=[q,a]", "trainer.max_steps=1")
    result = command("train", *few)
    assert result.code == 0, result.terminal
    assert "data.batch_size=4: there are 4 training rows." in result.terminal
    assert OmegaConf.load(result.output / "config.yaml").data.batch_size == 4
    assert "\r" not in result.terminal
    result = command("train", *few, "data.batch_size=32", f"output_dir={tmp_path}/other")
    assert result.code == 1 and "data.batch_size=32, but the data (text) has 4 training rows" in result.terminal


@pytest.mark.slow
def test_two_processes_keep_the_start_too(train):
    spoil = ["data.columns=[q,a]", "optimizer.lr=0.5", "scheduler=constant", "trainer.max_steps=2"]
    result = train(*spoil, "trainer=ddp_cpu", "callback.progress=null")
    assert result.code == 0, result.terminal
    metrics = result.metrics()
    name = "retrieval/text/mrr"
    assert metrics[f"before/{name}"] == metrics[f"test/{name}"]
    weights = torch.load(result.output / "checkpoints" / "start.ckpt", weights_only=True)["state_dict"]
    for key, x in load_folder(str(result.output / "model"))[0].state_dict().items():
        assert torch.equal(x, weights[f"encoder.{key}"]), key
