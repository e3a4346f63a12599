"""From the command line to a model that others can open."""

import csv
import re

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import timer

from tercet.models.folder import read_checkpoint
from tests.conftest import TEXTS, tiny
from tests.end_to_end.conftest import FAST, write_texts


def test_ones_own_text_in_one_line(small):
    result = small("callback.progress.seconds=0")
    assert result.code == 0, result.terminal
    metrics = result.metrics()
    for name in (
        "retrieval/text/recall@1",
        "retrieval/text/mrr",
        "alignment_uniformity/text/alignment",
        "alignment_uniformity/text/uniformity",
    ):
        assert f"before/{name}" in metrics
        assert f"test/{name}" in metrics
        assert name in result.terminal
    assert {"train/loss", "train/sentences_per_second", "train/tokens_per_second", "train/padding", "train/memory_gb",
            "train/gradient_norm", "train/alignment", "train/uniformity"} <= metrics.keys()  # fmt: skip
    config = OmegaConf.load(result.output / "config.yaml")
    assert config.data.batch_size == 4
    assert "code " in (result.output / "revision.txt").read_text()
    assert (result.output / "checkpoints" / "last.ckpt").is_file()
    modes = {path.relative_to(result.output): path.stat().st_mode for path in result.output.rglob("*") if path.is_file()}
    assert len(set(modes.values())) == 1, f"who may read one file may read all: {modes}"
    lines = [line for line in result.terminal.splitlines() if line.startswith("step ")]
    assert [line[:11] for line in lines] == ["step 1 of 2", "step 2 of 2"], "the output is no terminal"
    assert ", loss " in lines[0] and "it/s" not in result.terminal
    before, after = (metrics[f"{stage}/retrieval/text/recall@1"] for stage in ("before", "test"))
    headline = f"retrieval/text/recall@1: {before:.4f} → {after:.4f}"
    assert headline in result.terminal and ("Worse than before training" in result.terminal) == (after < before)
    assert "<title>my.txt</title>" in (result.output / "report.html").read_text()
    with np.load(result.output / "examples.npz") as examples:
        assert examples["retrieval/text/mrr"].mean() == pytest.approx(metrics["test/retrieval/text/mrr"])


def test_the_model_folder_opens_in_sentence_transformers(small):
    from sentence_transformers import SentenceTransformer

    from tercet.app.commands.evaluate import open_model
    from tercet.models import CachedEncoder

    head = ["model.head.kind=mlp", "model.head.dim=16", "model.normalize=true"]
    result = small("model.pooling=cls", *head, "model.prompt='query: '")
    opened = SentenceTransformer(str(result.output / "model"), device="cpu")
    assert opened.prompts["default"] == "query: "
    theirs = torch.tensor(opened.encode(TEXTS))
    for name in (result.output, result.output / "model", result.output / "checkpoints" / "last.ckpt"):
        torch.testing.assert_close(CachedEncoder(open_model(str(name), None, "cpu"))(TEXTS), theirs, rtol=0, atol=1e-5)


def test_a_train_only_head_is_kept_but_not_exported(small):
    from safetensors.torch import load_file

    from tercet.models.folder import load_folder

    result = small("model.head.kind=mlp", "model.head.dim=16", "model.head.train_only=true", "save_dtype=bfloat16")
    assert load_file(result.output / "model" / "head.safetensors")["layer.0.bias"].dtype == torch.bfloat16
    encoder, _ = load_folder(str(result.output / "model"))
    assert encoder.eval()(encoder.prepare(TEXTS)).shape == (12, 32)
    assert encoder.train()(encoder.prepare(TEXTS)).shape == (12, 16)


def test_classification_leaves_its_layer_out_of_the_model(run):
    result = run("data.path={folder}/labels.csv", "data.columns=[text]", "data.label=topic", "objective=classification",
                 "evaluation@test=nearest_neighbor", "trainer.max_epochs=1", "trainer.log_every_n_steps=1")  # fmt: skip
    assert result.code == 0, result.terminal
    weights = torch.load(result.output / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert weights["classifier.weight"].shape == (3, 32) and weights["classes"].tolist() == [0, 1, 2]
    assert {"train/accuracy", "test/nearest_neighbor/text/recall@1"} <= result.metrics().keys()
    names = {path.name for path in (result.output / "model").iterdir()}
    assert "model.safetensors" in names and "head.safetensors" not in names


def test_pairs_with_masked_lm_a_label_and_both_directions(command, tmp_path):
    path = tmp_path / "pairs.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "answer", "topic"])
        writer.writerows([f"{text} {i}", TEXTS[-i % 12], i % 3] for i, text in enumerate(2 * TEXTS))
    result = command("train", *tiny(
        "data=text", f"data.path={path}", "data.columns=[question,answer]", "data.label=topic", "objective=simcse_sup",
        "objective.mlm.weight=0.1", "loss.direction=both", "loss.learn_temperature=true", *FAST))  # fmt: skip
    assert result.code == 0, result.terminal
    assert result.metrics()["train/mlm_loss"] > 0
    assert 0 < result.metrics()["train/temperature"] < 1
    assert (result.output / "before_after.png").stat().st_size > 10_000
    assert "# Nearest neighbors" in (result.output / "neighbors.md").read_text()


def test_the_best_checkpoint_is_the_one_that_is_kept(small, tmp_path):
    rows = ["task,subset,split,sentence1,sentence2,score"]
    rows += [f'STS-B,x,dev,"{TEXTS[i]}","{TEXTS[i + 1]}",{i % 5}' for i in range(8)]
    (tmp_path / "sts.csv").write_text("\n".join(rows) + "\n")
    result = small("evaluation@validation=stsb_dev", f"validation.path={tmp_path}/sts.csv", "monitor=val/sts/stsb/spearman",
                   "trainer.val_check_interval=1", "trainer.check_val_every_n_epoch=null", "trainer.max_steps=4",
                   "optimizer.lr=0.01", "optimized_metric=test/retrieval/text/mrr")  # fmt: skip
    assert result.code == 0, result.terminal
    seen = [float(row["val/sts/stsb/spearman"]) for row in csv.DictReader((result.output / "metrics.csv").open())
            if row["val/sts/stsb/spearman"]]  # fmt: skip
    assert len(seen) == 4
    last = torch.load(result.output / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 4
    assert result.metrics()["val/sts/stsb/spearman"] == pytest.approx(max(seen))
    best = torch.load(result.output / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["global_step"] == seen.index(max(seen)) + 1
    assert f"best val/sts/stsb/spearman: {max(seen):.4f}" in result.terminal


def test_the_seed_decides_everything(small):
    first = small("seed=3").metrics()
    same, other = small("seed=3").metrics(), small("seed=4").metrics()
    timed = ("second", "memory", "waiting")
    assert {k: v for k, v in first.items() if not any(t in k for t in timed)} == {
        k: v for k, v in same.items() if not any(t in k for t in timed)
    }
    assert first["train/loss"] != other["train/loss"]


def test_streams_are_read_as_they_come(small):
    result = small("data.streaming=true", "data.held_out=4", "trainer.max_steps=3", "trainer.max_epochs=-1")
    assert result.code == 0, result.terminal
    assert result.metrics()["train/loss"] > 0


def test_the_rows_held_out_of_a_stream_are_not_trained_on(tmp_path):
    from tercet.data import TextFiles

    write_texts(tmp_path / "my.txt")
    sides = {split: TextFiles(str(tmp_path / "my.txt"), split=split, held_out=7, streaming=True) for split in ("train", "test")}
    train = {row["text"] for row in sides["train"].rows()}
    test = set(sides["test"].rows()["text"])
    assert (len(train), len(test)) == (33, 7)
    assert not train & test


def test_a_stream_without_an_end_is_refused(small):
    result = small("data.streaming=true", "data.held_out=4", "trainer.max_steps=-1", "trainer.max_epochs=2")
    assert result.code == 1
    assert "trainer.max_steps" in result.terminal


def test_every_logger_gets_configuration_code_and_data(small):
    result = small("logger=[csv,tensorboard]", "callback.embeddings.source=${data.test}")
    assert result.code == 0, result.terminal
    events = b"".join(e.read_bytes() for e in (result.output / "tensorboard").rglob("events*"))
    for content in (events, (result.output / "hparams.yaml").read_bytes()):
        for word in (b"revision", b"fingerprint", b"temperature", b"batch_size"):
            assert word in content
    for word in (b"embeddings", b"hardest negative"):
        assert word in events


def test_without_loggers_it_runs_too(small):
    assert small("logger=none").code == 0


def test_debugging_takes_two_steps(small):
    result = small("trainer=debug", "trainer.max_steps=50")
    assert result.code == 0, result.terminal
    assert "2 steps, data" in result.terminal


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_trains_and_measures(small, precision):
    result = small(f"trainer.precision={precision}", "data.batch_size=2", "trainer.max_steps=1")
    assert result.code == 0, result.terminal


def test_a_sweep_ends_with_mean_and_sd(command, tmp_path):
    path = tmp_path / "my.txt"
    write_texts(path)
    root = tmp_path / "sweep"
    result = command("train", "-m", "seed=1,2", "data.batch_size=4,400", *tiny(
        "data=text", f"data.path={path}", *FAST[:-1], f"hydra.sweep.dir={root}"))  # fmt: skip
    assert "mean ± sd over 2 runs" in result.terminal
    assert result.terminal.count("error: data.batch_size=400, but the data (text) has") == 2
    assert result.code == 1, "two jobs failed"
    assert (root / "0" / "metrics.json").is_file()
    assert "data.batch_size=400" in (root / "1" / "error.txt").read_text()
    import json

    entry = json.loads((root / "summary.json").read_text())["test/retrieval/text/mrr"]
    values = [json.loads((root / job / "metrics.json").read_text())["test/retrieval/text/mrr"] for job in ("0", "2")]
    assert entry["mean"] == pytest.approx(sum(values) / 2)
    assert entry["sd"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)


class Clock:
    """A clock that goes on by ``seconds`` each time it is read."""

    def __init__(self, seconds):
        self.seconds, self.now = seconds, 0.0

    def monotonic(self):
        self.now += self.seconds
        return self.now


TIMED = [
    "scheduler.warmup=0",
    "optimizer.lr=3e-5",
    "trainer.max_epochs=-1",
    "trainer.max_time=00:00:00:30",
    "trainer.log_every_n_steps=1",
    "trainer.gradient_clip_val=null",
]


def rates(output):
    with (output / "metrics.csv").open() as file:
        return [float(row["train/lr"]) for row in csv.DictReader(file) if row["train/lr"]]


def test_a_run_of_a_given_time_ends_with_it_and_its_rates_fall_until_then(small, monkeypatch, tmp_path):
    monkeypatch.setattr(timer, "time", Clock(0.5))
    whole = small(*TIMED, "trainer.max_steps=-1", "callback.progress.seconds=0")
    assert whole.code == 0, whole.terminal
    found = rates(whole.output)
    assert len(found) > 5 and found == sorted(found, reverse=True)
    assert found[-1] < 0.2 * found[0]
    assert re.search(r"step 1, at most 0\.\d min left", whole.terminal), whole.terminal
    whole.output.rename(tmp_path / "whole")
    by_steps = small(*TIMED, "trainer.max_steps=3")
    assert rates(by_steps.output)[-1] == pytest.approx(1e-5), "the steps end it first"


def test_a_resumed_run_has_the_time_that_was_left(small, monkeypatch):
    clock = Clock(0.5)
    monkeypatch.setattr(timer, "time", clock)
    first = small(*TIMED, "trainer.max_steps=4", "save_every=1")
    assert first.code == 0, first.terminal
    used = read_checkpoint(first.output / "checkpoints" / "last.ckpt")["callbacks"]["Timer"]["time_elapsed"]["train"]
    clock.now += 1000  # nothing runs meanwhile
    resumed = small(*TIMED, "trainer.max_steps=-1", "save_every=1", "resume=true")
    assert resumed.code == 0, resumed.terminal
    total = read_checkpoint(first.output / "checkpoints" / "last.ckpt")["callbacks"]["Timer"]["time_elapsed"]["train"]
    assert 0 < used < 30 <= total < 35
    assert rates(first.output)[-1] < 0.2 * rates(first.output)[0]


def test_a_length_that_is_not_known_is_explained(small):
    result = small("trainer.max_epochs=-1", "trainer.max_steps=-1", "trainer.max_time=6 minutes")
    assert result.code == 1 and "DD:HH:MM:SS" in result.terminal, result.terminal
