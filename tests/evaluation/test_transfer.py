import json
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from tercet.app.cli import main
from tercet.app.components import build
from tercet.errors import InputError
from tercet.evaluation import Transfer
from tercet.models.encoder import CachedEncoder
from tercet.models.folder import save_model
from tests.conftest import composed, tiny
from tests.evaluation.fakes import words

GOOD = ["fine warm film", "a warm play", "fine fine harp"]
BAD = ["dull cold film", "a cold play", "dull dull harp"]


def write(path, rows):
    pd.DataFrame(rows, columns=["task", "split", "sentence1", "sentence2", "label"]).to_parquet(path)
    return str(path)


def one(task, splits, n=8):
    """Rows whose first word tells the label."""
    return [
        [task, split, f"{(BAD, GOOD)[y][i % 3]} {i}", f"{GOOD[i % 3]} {i}" if task == "MRPC" else None, y]
        for split in splits for i in range(n) for y in (0, 1)
    ]  # fmt: skip


ROWS = one("CR", ["all"]) + one("SST2", ["train", "dev", "test"]) + one("TREC", ["train", "test"])
ROWS += one("MRPC", ["train", "test"])


def transfer(path, tasks=("CR", "SST2", "TREC", "MRPC"), folds=4):
    return Transfer(path, list(tasks), folds, 1, "cpu")


def test_what_words_tell_is_learned(tmp_path):
    metrics = transfer(write(tmp_path / "t.parquet", ROWS))(words)
    for task in ("cr", "sst2", "trec", "mrpc"):
        assert metrics[f"transfer/{task}/accuracy"] > 0.8
    assert metrics["transfer/mrpc/f1"] > 0.8
    assert metrics["transfer/avg/accuracy"] == pytest.approx(
        sum(metrics[f"transfer/{t}/accuracy"] for t in ("cr", "sst2", "trec", "mrpc")) / 4
    )


def test_vectors_that_say_nothing_score_the_larger_class(tmp_path):
    rows = [["CR", "all", f"text {i}", None, int(i % 10 < 7)] for i in range(200)]
    found = transfer(write(tmp_path / "t.parquet", rows), ["CR"])(lambda texts: torch.zeros(len(texts), 4))
    assert found == {"transfer/cr/accuracy": pytest.approx(0.7)}


def test_test_rows_teach_nothing(tmp_path):
    """Turned labels in the test split turn the score, and nothing else."""
    turned = [[*row[:4], 1 - row[4]] if row[1] == "test" else row for row in one("TREC", ["train", "test"])]
    found = transfer(write(tmp_path / "t.parquet", turned), ["TREC"])(words)
    assert found["transfer/trec/accuracy"] < 0.05


def test_pairs_are_told_by_difference_and_product(tmp_path):
    seen = []
    evaluator = transfer(write(tmp_path / "t.parquet", ROWS), ["MRPC"])
    original = Transfer._fit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Transfer, "_fit", lambda self, x, data, splits: seen.append(x) or original(self, x, data, splits))
        evaluator(words)
        evaluator.examples(words)
        assert len(seen) == 1, "the same embeddings are not fitted twice"
        evaluator.examples(lambda texts: 2 * words(texts))
        assert len(seen) == 2, "others are"
    data = evaluator.data["MRPC"]
    u, v = words(data.first), words(data.second)
    torch.testing.assert_close(seen[0], torch.cat([(u - v).abs(), u * v], 1))


def test_the_value_of_a_test_row_is_whether_it_is_right(tmp_path):
    """With one test label turned, the value of that row turns and no other."""
    turned = [list(row) for row in ROWS]
    rows = [i for i, row in enumerate(ROWS) if row[:2] == ["TREC", "test"]]
    turned[rows[5]][4] = 1 - turned[rows[5]][4]
    before, after = (
        transfer(write(tmp_path / f"{i}.parquet", table), ["TREC"]).examples(words)["transfer/trec/accuracy"]
        for i, table in enumerate((ROWS, turned))
    )
    assert len(before) == len(rows) and set(before) <= {0, 1}
    assert np.flatnonzero(before != after).tolist() == [5]


def test_tables(tmp_path):
    path = write(tmp_path / "t.parquet", ROWS)
    metrics = transfer(path)(words)
    text = transfer(path).table(metrics)
    assert "CR    SST2    TREC    MRPC    Avg." in text and "Not measured: MR, SUBJ, MPQA." in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ["cr"]}, r"tasks has cr: .*Did you mean CR\?"),
        ({"tasks": []}, r"tasks=\[\]: a list"),
        ({"folds": 1}, "folds=1: 2 or more"),
        ({"folds": 9}, r"CR: the label number 0 .* has 8 rows, fewer than the 9 folds.*folds=8"),
    ],
)
def test_bad_arguments(tmp_path, change, message):
    path = write(tmp_path / "t.parquet", ROWS)
    with pytest.raises(InputError, match=message):
        transfer(path, **change)(words)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (["CR", "train", "x y", None, 1], r"row 17 \(CR\): the split is 'train'; CR has all"),
        (["CR", "all", " ", None, 1], r"row 17 \(CR\): sentence1 is empty, a sentence is needed"),
        (["CR", "all", "x y", None, None], r"row 17 \(CR\): there is no label"),
        (["CR", "all", "x y", None, 2], r"CR: the label number 2 .* has 1 rows, fewer than the 4 folds"),
    ],
)
def test_bad_rows(tmp_path, row, message):
    rows = pd.DataFrame([*one("CR", ["all"]), row]).astype({4: "Int8"})
    rows.columns = ["task", "split", "sentence1", "sentence2", "label"]
    rows.to_parquet(tmp_path / "t.parquet")
    with pytest.raises(InputError, match=message):
        transfer(str(tmp_path / "t.parquet"), ["CR"])(words)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (one("TREC", ["train"]), "has no test rows of TREC"),
        ([["CR", "all", "x", None, 1]] * 9, "CR: every label is 1"),
        (one("MR", ["all"]), "has no rows of CR, TREC. It holds: MR all"),
    ],
)
def test_bad_tables(tmp_path, rows, message):
    with pytest.raises(InputError, match=message):
        transfer(write(tmp_path / "t.parquet", rows), ["CR", "TREC"])(words)


def peer(x, y, train, penalty):
    """scikit-learn in the place of ours."""
    found = []
    for rows, size in zip(train, penalty.tolist(), strict=True):
        fitted = LogisticRegression(C=1 / (size * int(rows.sum())), max_iter=3000, tol=1e-5)
        found.append(fitted.fit(x[rows].numpy(), y[rows].numpy()).predict(x.numpy()))
    return torch.stack([torch.from_numpy(one) for one in found])


@pytest.mark.slow
def test_scikit_learn_agrees_within_half_a_point(shared, monkeypatch):
    encoder = build(composed("model=glove", "data=books").model).eval()
    evaluator = Transfer("transfer.parquet", ["CR", "TREC", "MRPC"], 10, 1111, "cpu")
    encode, known = CachedEncoder(encoder), {}
    ours = evaluator(lambda texts: known.setdefault("z", encode(texts)))
    monkeypatch.setattr("tercet.evaluation.transfer.fit_predict", peer)
    theirs = evaluator(lambda texts: known["z"])
    for task in ("cr", "trec", "mrpc"):
        assert abs(ours[f"transfer/{task}/accuracy"] - theirs[f"transfer/{task}/accuracy"]) < 0.005


def test_both_of_the_papers_tables_in_one_call(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_model(build(composed(*tiny()).model).eval(), tmp_path / "model")
    sts = [["STS-B", "x", "test", "a harp", f"a {word}", score] for word, score in (("harp", 5.0), ("dog", 1.0), ("cat", 0.0))]
    pd.DataFrame(sts, columns=["task", "subset", "split", "sentence1", "sentence2", "score"]).to_parquet("s.parquet")
    write(tmp_path / "t.parquet", ROWS)
    members = ["evaluation.members.sts.path=s.parquet", "evaluation.members.transfer.path=t.parquet",
               "evaluation.members.transfer.folds=4"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["tercet", f"model={tmp_path / 'model'}", "evaluation=paper", *members, "output=m.json"])
    with pytest.raises(SystemExit) as stopped:
        main("evaluate")
    assert stopped.value.code == 0
    out = capsys.readouterr().err
    assert "STS, test split, x100" in out and "Transfer, accuracy x100" in out
    assert {"test/sts/stsb/spearman", "test/transfer/cr/accuracy"} <= json.loads((tmp_path / "m.json").read_text()).keys()
