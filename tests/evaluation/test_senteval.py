"""SentEval's folder, written here in its layout: the same pairs as a table's, complete or refused."""

from collections import defaultdict

import pyarrow.parquet as pq
import pytest

from tercet.errors import InputError
from tercet.evaluation import STS, Transfer
from tercet.evaluation.senteval import COUNTS, PAIRS, POLARITY, SUBSETS, TREC, SentEval
from tercet.evaluation.sts import STS_TASKS
from tercet.evaluation.transfer import TRANSFER_SPLITS, TRANSFER_TASKS
from tests.evaluation.fakes import words

YEAR = {  # a quote is a character, a pair without a gold score is none, the last line may be without one
    "FNWN": ["a b c\ta b d", '"a b\tc d', "x\ty"],
    "headlines": ["g h\tg h", "g h i\tx y z"],
    "OnWN": ["m n\tm n", "m\to p"],
}
GOLD = {"FNWN": "3.0\n0.5\n\n", "headlines": "5\n1.25\n", "OnWN": "4.8\n0.2"}
KNOWN = {"STS13": {"test": 6}, "STS-B": {"dev": 2, "test": 2}, "SICK-R": {"dev": 2, "test": 3}, "MR": {"all": 4}}
KNOWN |= {"CR": {"all": 5}, "SST2": {"train": 3, "dev": 2, "test": 2}, "TREC": {"train": 4, "test": 2}}
KNOWN |= {"MRPC": {"train": 4, "test": 2}}


def put(root, name, text, encoding="utf-8"):
    file = root / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding, newline="")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of a few rows, which are declared to be all."""
    for task, counts in KNOWN.items():
        monkeypatch.setitem(COUNTS, task, counts)
    root = tmp_path / "SentEval" / "data" / "downstream"
    for subset, pairs in YEAR.items():
        put(root, f"STS/STS13-en-test/STS.input.{subset}.txt", "".join(f"{pair}\n" for pair in pairs))
        put(root, f"STS/STS13-en-test/STS.gs.{subset}.txt", GOLD[subset])
    for split in ("dev", "test"):
        line = 'main-captions\tMSRvid\t2012test\t0001\t{}\ta "man" plays\t"a man is {}\n'
        put(root, PAIRS["STS-B", split][0], line.format("5.000", split) + line.format("1.250", "far"))
    head = "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment\r\n"
    put(root, "SICK/SICK_trial.txt", head + "1\ta\tb\t1.2\tNEUTRAL\r\n2\ta\ta\t5.0\tENTAILMENT\r\n")
    put(root, "SICK/SICK_test_annotated.txt", head + "".join(f"{i}\ta c\ta {i}\t{i}.5\tNEUTRAL\n" for i in range(1, 4)))
    for task, (negative, positive) in list(POLARITY.items())[:2]:
        put(root, negative, "bad caf\xe9\nbad\n", "latin-1")
        put(root, positive, "good\nvery good\n" + ("\n" if task == "CR" else ""))
    for split, rows in {
        "train": ["bad\t0", "good\t1", "so good\t1"],
        "dev": ["bad\t0", "good\t1"],
        "test": ["bad\t0"] * 2,
    }.items():
        put(root, f"SST/binary/sentiment-{split}", "".join(f"{row}\n" for row in rows))
    put(root, TREC["train"], "DESC:manner How ?\nDESC:def What ?\nNUM:date When was : it ?\nNUM:count How many ?\n")
    put(root, TREC["test"], "NUM:dist How far ?\nDESC:def What 's it ?\n")
    head = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
    pairs = [f'{i % 2}\t1\t2\t"He said " a\tHe said b\n' for i in range(4)]
    put(root, "MRPC/msr_paraphrase_train.txt", head + "".join(pairs))
    put(root, "MRPC/msr_paraphrase_test.txt", head + "".join(pairs[:2]))
    return tmp_path / "SentEval"


@pytest.mark.parametrize("inside", ["", "data", "data/downstream"])
def test_pairs_of_every_file(folder, inside):
    evaluator = STS(folder / inside, ["STS13", "STS-B", "SICK-R"])
    pairs = evaluator.pairs
    assert pairs["STS13"].first == ["a b c", '"a b', "g h", "g h i", "m n", "m"]
    assert pairs["STS13"].gold.tolist() == [3, 0.5, 5, 1.25, 4.8, 0.2]
    assert pairs["STS13"].subset.tolist() == ["FNWN"] * 2 + ["headlines"] * 2 + ["OnWN"] * 2
    assert pairs["STS-B"].first == ['a "man" plays'] * 2 and pairs["STS-B"].second == ['"a man is test', '"a man is far']
    assert pairs["SICK-R"].second == ["a 1", "a 2", "a 3"] and pairs["SICK-R"].gold.tolist() == [1.5, 2.5, 3.5]
    assert {"sts/sts13/spearman_wmean", "sts/stsb/spearman", "sts/avg/spearman_all"} <= evaluator(words).keys()
    assert STS(folder, ["SICK-R"], "dev").pairs["SICK-R"].gold.tolist() == [1.2, 5]


def test_rows_of_the_classification_tasks(folder):
    data = Transfer(folder, ["MR", "CR", "SST2", "TREC", "MRPC"], folds=2).data
    assert data["MR"].first == ["bad caf\xe9", "bad", "good", "very good"] and data["MR"].label.tolist() == [0, 0, 1, 1]
    assert data["CR"].first[-1] == "."  # a blank line is a row of SentEval's
    assert data["SST2"].split.tolist() == ["train"] * 3 + ["dev"] * 2 + ["test"] * 2
    assert data["TREC"].first == ["How ?", "What ?", "When was : it ?", "How many ?", "How far ?", "What 's it ?"]
    assert data["TREC"].label.tolist() == [0, 0, 1, 1, 1, 0]
    assert data["MRPC"].first == ['"He said " a'] * 6 and data["MRPC"].second[0] == "He said b"
    assert set(Transfer(folder, ["TREC"], folds=2)(words)) == {"transfer/trec/accuracy"}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("STS/STS13-en-test/STS.gs.OnWN.txt", lambda text: "4.8\n", r"STS.input.OnWN.txt has 2 lines and .*gs.OnWN.txt 1"),
        ("STS/STS13-en-test/STS.gs.OnWN.txt", None, "is a folder without STS/STS13-en-test/STS.gs.OnWN.txt"),
        ("STS/STS13-en-test/STS.input.FNWN.txt", lambda text: text.replace("\t", " ", 1), "FNWN.txt, line 1: 1 cells, 2 are"),
        (
            "STS/STS13-en-test/STS.gs.FNWN.txt",
            lambda text: "\n0.5\n\n",
            r"STS13 has 5 test rows here, SentEval's 6: .*another test",
        ),
        ("STS/STS13-en-test/STS.gs.FNWN.txt", lambda text: "x\n0.5\n\n", r"FNWN.txt, line 1: the score is 'x'"),
        ("SICK/SICK_test_annotated.txt", lambda text: text + "9\tp\tq\t1\n", "SICK-R has 4 test rows here, SentEval's 3"),
    ],
)
def test_a_folder_that_is_not_sentevals(folder, name, change, message):
    file = folder / "data" / "downstream" / name
    file.unlink() if change is None else file.write_text(change(file.read_text()))
    with pytest.raises(InputError, match=message) as caught:
        STS(folder, ["STS13", "SICK-R"])(words)
    assert "path" in caught.value.parameters()


def test_bytes_that_are_no_utf8(folder):
    (folder / "data/downstream/MRPC/msr_paraphrase_test.txt").write_bytes(b"head\n0\t1\t2\tcaf\xe9\tb\n")
    with pytest.raises(InputError, match=r"msr_paraphrase_test.txt: byte 14 is not UTF-8"):
        Transfer(folder, ["MRPC"])(words)


def test_relative_paths_start_in_the_data_folder(folder, monkeypatch):
    monkeypatch.setenv("TERCET_DATA", str(folder.parent))
    assert len(STS("SentEval", ["STS13"]).pairs["STS13"].gold) == 6
    assert len(Transfer("SentEval", ["MR"]).data["MR"].first) == 4


def test_the_known_counts():
    """The pairs over which SimCSE's average is, and those that select a model."""
    tests = {task: COUNTS[task]["test"] for task in STS_TASKS}
    years = {"STS12": 3108, "STS13": 1500, "STS14": 3750, "STS15": 3000, "STS16": 1186}
    assert tests == years | {"STS-B": 1379, "SICK-R": 4927}
    assert COUNTS["STS-B"]["dev"] == 1500
    assert SUBSETS.keys() == years.keys() and COUNTS.keys() == {*STS_TASKS, *TRANSFER_TASKS}
    assert all(set(COUNTS[task]) == set(splits) for task, splits in TRANSFER_SPLITS.items())


def test_the_real_pairs_are_those_of_the_table(shared, tmp_path):
    """All pairs of STS13 and STS-B, and MR's rows, written as SentEval has them: counts are the real ones."""
    table = str(shared / "sts.parquet")
    files, gold = defaultdict(list), defaultdict(list)
    for row in pq.read_table(table).to_pylist():
        pair = f"{row['sentence1']}\t{row['sentence2']}\n"
        if row["task"] == "STS13":
            files[f"STS/STS13-en-test/STS.input.{row['subset']}.txt"].append(pair)
            gold[f"STS/STS13-en-test/STS.gs.{row['subset']}.txt"].append(f"{row['score']}\n")
        elif row["task"] == "STS-B" and row["split"] == "test":
            files["STS/STSBenchmark/sts-test.csv"].append(f"genre\tfile\tyear\t0\t{row['score']}\t{pair}")
    for row in pq.read_table(shared / "transfer.parquet").to_pylist():
        if row["task"] == "MR":
            files[POLARITY["MR"][row["label"]]].append(f"{row['sentence1']}\n")
    for name, lines in (files | gold).items():
        put(tmp_path, name, "".join(lines))
    tasks = ["STS13", "STS-B"]
    assert STS(tmp_path, tasks)(words) == pytest.approx(STS(table, tasks)(words), abs=1e-6)
    assert len(SentEval(tmp_path, tmp_path).transfer("MR")) == 10662
