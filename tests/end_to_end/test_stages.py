"""Stages: several runs as one, each from the model that the last one left."""

import csv
import json
import re

import pytest
import torch
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import ModelCheckpoint

from tercet.app.commands.evaluate import open_model
from tercet.models import CachedEncoder
from tests.conftest import CONF, MINILM, TEXTS, tiny
from tests.end_to_end.conftest import FAST, write_texts

TWO = ["+stages.runs.words={objective:mlm}", "+stages.runs.looks={objective:simcse_unsup,optimizer:{lr:0.01}}"]
SHOWN = ["stages.in_domain=retrieval/text/mrr", "stages.out_of_domain=alignment_uniformity/text/uniformity"]


@pytest.fixture
def staged(command, tmp_path):
    """``staged(*overrides)``: two stages of a tiny model on one's own sentences."""
    path = tmp_path / "my.txt"
    write_texts(path)

    def run(*overrides):
        return command("train", *tiny("data=text", f"data.path={path}", "logger=none", *FAST[1:], *TWO, *overrides))

    return run


def vectors(path):
    return CachedEncoder(open_model(str(path), None, "cpu"))(TEXTS)


def test_each_stage_starts_where_the_last_one_ended(staged):
    result = staged(*SHOWN)
    assert result.code == 0, result.terminal
    first, second = (json.loads((result.output / name / "metrics.json").read_text()) for name in ("1_words", "2_looks"))
    metrics = result.metrics()
    for name in ("retrieval/text/mrr", "alignment_uniformity/text/uniformity"):
        assert metrics[f"before/{name}"] == first[f"before/{name}"]
        assert metrics[f"words/{name}"] == first[f"test/{name}"]
        assert metrics[f"looks/{name}"] == metrics[f"test/{name}"] == second[f"test/{name}"]
        assert f"before/{name}" not in second, "the first stage has measured it already"
    table = (result.output / "stages.txt").read_text().splitlines()
    assert table[0].split() == ["before", "words", "looks"]
    assert table[1].split()[0] == "retrieval/text/mrr" and table[2].split()[0] == "alignment_uniformity/text/uniformity"
    start, end = (metrics[f"{stage}/alignment_uniformity/text/uniformity"] for stage in ("before", "looks"))
    assert table[3].startswith("forgotten: alignment_uniformity/text/uniformity")
    assert float(table[3].split()[-1]) == pytest.approx(end - start, abs=1e-4), "smaller is better"
    assert (result.output / "stages.png").stat().st_size > 5000
    torch.testing.assert_close(vectors(result.output), vectors(result.output / "2_looks"))


def test_a_stage_alone_from_the_same_start_is_the_same(staged, command, tmp_path):
    """Nothing but the start is handed on."""
    staged().output.rename(tmp_path / "staged")
    together = vectors(tmp_path / "staged")
    alone = command(
        "train",
        *tiny("data=text", f"data.path={tmp_path / 'my.txt'}", "logger=none", *FAST[1:], "~experiment"),
        "objective=simcse_unsup",
        "optimizer.lr=0.01",
        "measure_before=false",
        f"init_from={tmp_path / 'staged' / '1_words'}",
    )
    assert alone.code == 0, alone.terminal
    assert (alone.output / "checkpoints").is_dir()
    assert torch.equal(vectors(alone.output / "model"), together)
    assert not torch.allclose(vectors(tmp_path / "staged" / "1_words"), together)


def test_stages_take_chains_and_dictionaries_and_need_no_evaluator(staged, tmp_path):
    with (tmp_path / "kinds.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text", "kind"], *([f"{t} {i}", "ab"[i % 2]] for t in TEXTS for i in range(4))])
    result = staged(
        f"data.path={tmp_path / 'kinds.csv'}",
        "data.columns=[text]",
        "stages.runs.words=null",
        "+stages.runs.looks.data={where:{kind:[b]}}",
        "+stages.runs.looks.view={second:[{_target_:tercet.views.Crop,rate:0.2},{_target_:tercet.views.Shuffle}]}",
        "evaluation@test=none",
    )
    assert result.code == 0, result.terminal
    assert len(OmegaConf.load(result.output / "1_looks" / "config.yaml").view.second) == 2
    assert (result.output / "metrics.json").is_file()


def test_what_is_finished_is_kept(staged):
    first = staged("optimizer.eps=1e-7")
    assert first.code == 0, first.terminal
    before = first.metrics()
    again = staged("optimizer.eps=1e-7")
    assert again.code == 0 and "held another run, which is now in before-1" in again.terminal
    kept = json.loads((again.output / "before-1" / "metrics.json").read_text())
    assert {k: v for k, v in kept.items() if k != "run"} == before
    (first.output / "2_looks" / "metrics.json").unlink()  # as if it had been interrupted
    resumed = staged("optimizer.eps=1e-7", "resume=true")
    assert resumed.code == 0, resumed.terminal
    assert "1_words is finished; kept" in resumed.terminal and "2 of 2: looks" in resumed.terminal
    assert {k: v for k, v in resumed.metrics().items() if not k.startswith("train")} == pytest.approx(before, abs=1e-6)
    other = staged("optimizer.eps=1e-6", "resume=true")
    assert other.code == 1 and "1_words was finished with optimizer.eps=1e-07, not 1e-06" in other.terminal


def test_a_stage_may_be_left_out_and_all_may_not(staged):
    result = staged("stages.runs.words=null")
    assert result.code == 0, result.terminal
    assert not (result.output / "1_words").exists() and (result.output / "1_looks" / "metrics.json").is_file()
    assert "before/retrieval/text/mrr" in result.metrics()
    assert "every stage is null" in staged("stages.runs.words=null", "stages.runs.looks=null").terminal
    assert "stages.runs.words=5: a group of keys is needed" in staged("stages.runs.words=5").terminal


@pytest.mark.slow
def test_seeds_of_stages_end_in_one_table(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path / "my.txt")
    result = command("train", "-m", "seed=1,2", *tiny("data=text", "data.path=my.txt", "logger=none", *FAST[1:], *TWO, *SHOWN))
    assert result.code == 0, result.terminal
    assert "mean ± sd over 2 runs" in result.terminal and "words  →" in result.terminal
    root = next((tmp_path / "outputs" / "multirun").rglob("summary.json")).parent
    assert "words/retrieval/text/mrr" in json.loads((root / "summary.json").read_text())
    assert (root / "stages.png").is_file()


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (["init_from=nowhere.ckpt"], "there is no such file"),
        ([f"init_from={MINILM}"], "it reads other tokens .* than this model"),
        ([f"init_from={MINILM}", f"model.tokenizer.name={MINILM}", "model.backbone.config.vocab_size=30522"],
         r"is .* there and .* here. Use the model that it was trained with"),
    ],
)  # fmt: skip
def test_a_start_that_does_not_fit_is_named(small, start, message):
    result = small(*start)
    assert result.code == 1
    assert re.search(message, result.terminal)


def test_other_words_are_not_taken_for_ones_own(command, tmp_path):
    write_texts(tmp_path / "my.txt")
    words = ["model=gru", "model.backbone.hidden_size=8", "model.backbone.trained_dim=4", "model.tokenizer.minimum=1"]
    run = ["data=text", f"data.path={tmp_path / 'my.txt'}", *words, "view=deletion", "evaluation@test=none", *FAST[1:]]
    first = command("train", *run, "logger=none", "model.tokenizer.size=20")
    assert first.code == 0, first.terminal
    first.output.rename(tmp_path / "first")
    result = command("train", *run, "logger=none", "model.tokenizer.size=21", f"init_from={tmp_path / 'first'}")
    assert result.code == 1 and "it reads other tokens (22) than this model (23)" in result.terminal


def test_a_head_of_another_shape_starts_anew(small, tmp_path):
    first = small("model.head.kind=mlp", "model.head.dim=16")
    first.output.rename(tmp_path / "first")
    result = small("model.head.kind=linear", "model.head.dim=8", f"init_from={tmp_path / 'first'}")
    assert result.code == 0 and "the head starts anew" in result.terminal


def test_a_stage_that_was_stopped_goes_on_from_its_checkpoint(staged, tmp_path, monkeypatch):
    long = ["trainer.max_steps=6", "save_every=2"]
    whole = staged(*long)
    expected = vectors(whole.output)
    whole.output.rename(tmp_path / "whole")
    original = ModelCheckpoint.on_train_batch_end

    def killed(self, trainer, *args, **kwargs):
        original(self, trainer, *args, **kwargs)
        if "2_looks" in str(self.dirpath) and trainer.global_step == 5:
            self.save_on_exception = False
            raise KeyboardInterrupt

    monkeypatch.setattr(ModelCheckpoint, "on_train_batch_end", killed)
    assert staged(*long).code == 130
    monkeypatch.setattr(ModelCheckpoint, "on_train_batch_end", original)
    resumed = staged(*long, "resume=true")
    assert "1_words is finished; kept" in resumed.terminal and "last.ckpt, step 4" in resumed.terminal
    assert torch.equal(vectors(resumed.output), expected)


def test_the_example_of_the_docs(command, tmp_path, monkeypatch):
    text = (CONF.parent / "docs" / "howto" / "domain_adaptation.md").read_text().split("```yaml\n")[1].split("```")[0]
    (tmp_path / "my_conf" / "experiment").mkdir(parents=True)
    (tmp_path / "my_conf" / "experiment" / "my_domain.yaml").write_text(text.replace("adaptation", "heldout"))
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path / "tickets.txt")
    with open("faq.csv", "w", newline="") as file:
        csv.writer(file).writerows([["question", "answer"], *([f"{a} {i}", b] for i, a in enumerate(TEXTS) for b in TEXTS)])
    result = command(
        "train", "--config-dir=my_conf", "experiment=my_domain", *tiny(*FAST[1:]), "logger=none", "trainer.max_epochs=1"
    )
    assert result.code == 0, result.terminal
    assert list(dict.fromkeys(name.split("/")[0] for name in sorted(result.metrics()))) == [
        "before", "pretrain", "supervised", "test", "unsupervised",
    ]  # fmt: skip
    assert "retrieval/support/recall@1" in (result.output / "stages.txt").read_text()
