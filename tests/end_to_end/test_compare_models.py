"""Is model A better than B, by the examples of a test: ``tercet evaluate`` of each, then ``tercet compare`` of the files."""

import csv
import json

import numpy as np
import pytest
import torch

from tercet.app.components import build
from tercet.evaluation.significance import holm, randomization_test
from tercet.models.folder import save_model
from tests.conftest import TEXTS, composed, tiny

MRR = "retrieval/table/mrr"


@pytest.fixture
def evaluated(command, tmp_path, monkeypatch):
    """``evaluated(name, *overrides)``: results of a small random model of this name, on questions and answers."""
    monkeypatch.chdir(tmp_path)
    texts = [text.replace(",", "") for text in TEXTS]
    rows = [f"{texts[i]} {i},{texts[i].split()[0]} {texts[(i + 1) % 12]} {i}" for i in range(12)]
    (tmp_path / "faq.csv").write_text("\n".join(["question,answer", *rows]) + "\n")

    def run(name, *overrides):
        torch.manual_seed(ord(name[0]))
        save_model(build(composed(*tiny()).model).eval(), tmp_path / name)
        source = ["evaluation=retrieval", "evaluation.source.path=faq.csv", "evaluation.source.columns=[question,answer]",
                  "evaluation.name=table"]  # fmt: skip
        result = command("evaluate", f"model={name}", *source, f"output={name}.json", *overrides)
        assert result.code == 0, result.terminal
        return result.terminal

    return run


def test_models_are_compared_by_example(evaluated, command, tmp_path):
    for name in "abc":
        assert f"Written to {name}.json, {name}_examples.npz" in evaluated(name)
    metrics = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in "abc"}
    values = {name: np.load(tmp_path / f"{name}_examples.npz")[MRR].astype(float) for name in "abc"}
    for name in "abc":
        assert values[name].mean() == pytest.approx(metrics[name][f"test/{MRR}"])
    result = command("compare", "a.json", "b.json", "c.json", f"metric=test/{MRR}", "output=out")
    assert result.code == 0, result.terminal
    order = sorted("abc", key=lambda name: -metrics[name][f"test/{MRR}"])
    pairs = [(order[0], order[1]), (order[0], order[2]), (order[1], order[2])]
    p = holm([randomization_test(values[i], values[j]) for i, j in pairs])
    lines = (tmp_path / "out" / "comparison.txt").read_text().splitlines()
    assert lines[0] == f"test/{MRR}, more is better" and lines[1].startswith("results ") and lines[1].endswith(" examples")
    assert [line.split()[0] for line in lines[2:5]] == [f"{name}.json" for name in order]
    assert lines[3].split()[3:4] == [f"{p[0]:.2g}"] and lines[4].split()[3:4] == [f"{p[1]:.2g}"]
    text = " ".join(" ".join(lines).split())
    assert "There are no seeds here, so it says nothing about other training runs" in text
    assert f"ahead of results={order[1]}.json by +" in text and "over 12 test examples" in text
    assert "sign test" not in text and "seeds in common" not in text and "best run" not in text
    with (tmp_path / "out" / "comparison.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["results"] for row in rows] == ["a.json", "b.json", "c.json"] and "seed" not in rows[0]
    assert (tmp_path / "out" / "report.html").is_file() and (tmp_path / "out" / "comparison.png").is_file()
    result = command("compare", "runs=[a.json,b.json]")  # all metrics that have values, beside the first file
    assert (
        result.code == 0
        and "test/retrieval/table/ndcg@10, more is better" in (tmp_path / "comparison" / "comparison.txt").read_text()
    )


def test_a_clear_difference_is_called_so(evaluated, command, tmp_path):
    evaluated("a")
    values = dict(np.load(tmp_path / "a_examples.npz"))
    better = {MRR: np.ones(12, np.float32), "test_set": values["test_set"]}
    np.savez_compressed(tmp_path / "best_examples.npz", **better)
    (tmp_path / "best.json").write_text(json.dumps({f"test/{MRR}": 1.0}))
    result = command("compare", "a.json", "best.json")
    assert result.code == 0, result.terminal
    assert "results=best.json: test/retrieval/table/mrr 1.0000, ahead of results=a.json by +" in result.terminal
    row = next(line for line in result.terminal.splitlines() if line.startswith("a.json"))
    assert row.endswith("behind")


def test_results_that_cannot_be_compared_are_explained(evaluated, command, tmp_path):
    for name in "ab":
        evaluated(name)
    table = (tmp_path / "faq.csv").read_text().splitlines()

    def refused(message, *given):
        result = command("compare", *(given or ("a.json", "b.json")))
        assert result.code == 1 and message in " ".join(result.terminal.split()), result.terminal
        assert "Traceback" not in result.terminal

    refused("two or more different files are needed", "a.json")
    refused("two or more different files are needed", "a.json", "a.json")
    refused("runs=none.json: there is no such file", "a.json", "none.json")
    refused("give either folders or files", "a.json", ".")
    refused("metric=test/x has no values by example in all of these results", "a.json", "b.json", "metric=test/x")
    (tmp_path / "faq.csv").write_text("\n".join([table[0], *table[:0:-1]]) + "\n")  # the same rows, in another order
    evaluated("b")
    refused("12 test examples that are not the 12 of a.json. Evaluate all models on the same data")
    (tmp_path / "faq.csv").write_text("\n".join(table[:9]) + "\n")
    evaluated("b")
    refused("8 test examples that are not the 12 of a.json")
    (tmp_path / "faq.csv").write_text("\n".join(table) + "\n")
    evaluated("b")
    whole = (tmp_path / "b_examples.npz").read_bytes()
    (tmp_path / "b_examples.npz").write_bytes(whole[:200])
    refused("b_examples.npz cannot be read")
    (tmp_path / "b_examples.npz").write_bytes((tmp_path / "a_examples.npz").read_bytes())
    refused("but the mean of b_examples.npz is")
    (tmp_path / "b_examples.npz").unlink()
    refused("runs=b.json: b_examples.npz, its values by example, is not beside it")
    (tmp_path / "b_examples.npz").write_bytes(whole)
    (tmp_path / "b.json").write_text('{"test/other": 1.0}')
    refused("no metric has values by example in all of them")
    (tmp_path / "b.json").write_text("[1]")
    refused("b.json is not the metrics of a run")


def test_a_later_evaluation_without_values_leaves_none(evaluated, command, tmp_path):
    evaluated("a")
    rows = [f"{text.replace(',', '')} {i},{i % 4}" for i in range(4) for text in TEXTS]
    (tmp_path / "mine.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    result = command("evaluate", "model=a", "evaluation=clustering", "data=table", "data.path=mine.csv", "data.columns=[text]",
                     "data.label=label", "data.test.split=all", "data.held_out=0", "output=a.json")  # fmt: skip
    assert result.code == 0, result.terminal
    assert not (tmp_path / "a_examples.npz").exists() and "examples" not in result.terminal
