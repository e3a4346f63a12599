"""A base encoder from random weights, and the run that starts from it."""

import csv
import io
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks.pretraining import clock, prepare, runs, split
from tercet.app.components import build
from tercet.models import load
from tests.conftest import TEXTS, composed, tiny
from tests.end_to_end.conftest import FAST, write_texts


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Stand-ins for the shared data."""
    folder = tmp_path / "data"
    folder.mkdir()
    sentences = [f"{text} {i}" for i in range(6) for text in TEXTS]
    tables = {
        "sentences_unlabelled": {"text": sentences, "source": ["wikipedia", "book"] * 36},
        "books_ordered": {
            "text": sentences,
            "document": [f"book {i // 6}" for i in range(72)],
            "position": list(range(6)) * 12,
        },
        "sts": {"sentence1": [sentences[0].upper(), "x"], "sentence2": ["y", "z"]},
        "transfer": {"sentence1": ["x", "y"], "sentence2": [None, sentences[1]], "task": ["MR", "MRPC"]},
    }
    for name, columns in tables.items():
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    monkeypatch.setenv("TERCET_DATA", str(folder))
    return folder


SMALL = [
    "data.validation_rows=12", "data.workers=0", "evaluation@validation=none", "evaluation@test=none",
    *(o for o in FAST if not o.startswith(("logger", "selection"))), "logger=csv", "trainer.val_check_interval=1",
    "trainer.log_every_n_steps=1", "optimizer.lr=0.01", "trainer.max_time=null",
]  # fmt: skip


def test_perplexity_falls_and_the_next_run_starts_from_it(command, data, tmp_path):
    result = command(
        "train", "experiment=pretrain_english_small", *tiny(), *SMALL, "trainer.max_steps=6", "trainer.max_time=null"
    )
    assert result.code == 0, result.terminal
    rows = csv.DictReader((result.output / "metrics.csv").open())
    curve = [float(row["val/mlm/perplexity"]) for row in rows if row["val/mlm/perplexity"]]
    assert curve[-1] < 0.8 * curve[0], curve
    assert result.metrics()["val/mlm/perplexity"] == curve[-1] == curve[-2], "the same masks, the last weights"
    base = result.output.rename(tmp_path / "base")
    z = load(str(base)).encode(TEXTS)
    assert z.shape == (len(TEXTS), 32)
    write_texts(tmp_path / "my.txt")
    given = tiny("data=text", f"data.path={tmp_path}/my.txt", *FAST, "optimizer.lr=1e-9", "callback.best=null")
    again = command("train", *given, f"init_from={base}")
    assert again.code == 0, again.terminal
    torch.testing.assert_close(load(str(again.output)).encode(TEXTS), z)
    assert torch.equal(load(str(base / "model")).encode(TEXTS), z)


def test_the_prepared_file_holds_the_same_texts(data, tmp_path):
    given = ["data.validation_rows=12"]
    table = pq.read_table(prepare(tmp_path, given)).to_pylist()
    cfg = composed("experiment=pretrain_english_small", *given)
    for side in ("train", "validation"):
        assert sorted(row["text"] for row in table if row["split"] == side) == sorted(build(cfg.data[side]).rows()["text"])
    assert {row["source"] for row in table} == {"wikipedia", "book", "books"}
    held_out, trained = ({row["text"] for row in table if row["split"] == side} for side in ("validation", "train"))
    assert held_out and not held_out & trained
    assert not {TEXTS[0] + " 0", TEXTS[1] + " 0"} & trained, "they are in STS and in a transfer task"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("prepared", [False, True])
def test_the_benchmarks_settings_compose(device, prepared, data, tmp_path):
    if prepared:
        pq.write_table(pa.table({"text": TEXTS, "source": ["brown"] * 12, "split": ["train"] * 12}), data / "english.parquet")
    for overrides in runs(device).values():
        cfg = composed(*overrides, f"trainer.max_time={clock(365)}")
        assert cfg.trainer.max_time == "00:00:06:05"
        if prepared and "english" in str(cfg.data.get("path")):
            assert len(build(cfg.data.train).rows()) >= 10, "of which two may be held out"


def test_a_model_comes_back_from_its_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.pretraining.PART_BYTES", 10_000)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(bytes(range(256)) * 100)
    assert split(tmp_path / "model", tmp_path) > 2
    content = b"".join(part.read_bytes() for part in sorted(tmp_path.glob("model.tar.*")))
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        assert tar.extractfile("model/weights").read() == bytes(range(256)) * 100
