import datasets
import pytest

from tercet.errors import InputError
from tercet.evaluation import STS
from tests.evaluation.fakes import words
from tests.evaluation.test_sts import COLUMNS, ROWS, write

GOOD = ROWS[:5]


def changed(row, column, value):
    rows = [list(r) for r in GOOD]
    rows[row][COLUMNS.index(column)] = value
    return rows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("x", ["STS12"], "train"), r"split=train: choose one of test, dev"),
        (("x", ["STS12", "STS-B"], "dev"), r"split=dev, but STS12 has only a test split.*\[STS-B,SICK-R\]"),
        (("x", ["stsb"], "test"), r"tasks has stsb: there are STS12, .*Did you mean STS-B\?"),
        (("x", ["STS17"], "test"), r"tasks has STS17: there are STS12"),
        (("x", [], "test"), r"tasks=\[\]: a list"),
        (("x", "STS-B", "test"), r"tasks=STS-B: a list"),
        (("x", ["STS-B", "STS-B"], "test"), r"a list without repetitions"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        STS(*arguments)


def fails(path, message, tasks=("STS12",)):
    with pytest.raises(InputError, match=message) as caught:
        STS(str(path), list(tasks), "test")(words)
    assert caught.value.parameters()
    assert "\n" not in str(caught.value)


def test_no_such_file(tmp_path, monkeypatch):
    monkeypatch.setenv("TERCET_DATA", str(tmp_path))
    fails("none.parquet", r"path=none.parquet does not exist \(looked for .*none.parquet\)\. It takes SentEval")


def test_relative_paths_start_in_the_data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TERCET_DATA", str(tmp_path))
    write(tmp_path / "toy.parquet")
    assert list(STS("toy.parquet", ["STS12"], "test").pairs) == ["STS12"]


def test_a_folder(tmp_path):
    fails(tmp_path, r"is a folder without STS/STS12-en-test/STS.input.MSRpar.txt. It takes SentEval's folder data/downstream")


def test_an_unknown_ending(tmp_path):
    (tmp_path / "sts.xlsx").write_bytes(b"PK")
    fails(tmp_path / "sts.xlsx", r"ends in '.xlsx'. It takes SentEval.*a .parquet, .csv")


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl", "tsv"])
@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00no", b'{"task": 1}\n{"task": "'], ids=["empty", "bytes", "cut"])
def test_a_broken_file(tmp_path, kind, content):
    path = tmp_path / f"sts.{kind}"
    path.write_bytes(content)
    fails(path, r"path=.*(file is empty|not UTF-8|cut or not|must be there once|UTF-16)")


def test_lines_of_unequal_width(tmp_path):
    path = tmp_path / "sts.csv"
    path.write_text(",".join(COLUMNS) + "\nSTS12,one,test,a,b,3\nSTS12,one,test,a,b\n")
    fails(path, r"line 3 has 5 cells, the header 6")


def test_a_column_is_missing(tmp_path):
    path = write(tmp_path / "sts.parquet", [row[:5] for row in GOOD], (*COLUMNS[:4], "sent2"))
    fails(path, r"has the columns task, .*, sent2; sentence2, score must be there once")


@pytest.mark.parametrize("score", ["high", "4,5", "inf", "-inf"])
def test_a_score_that_is_no_number(tmp_path, score):
    rows = [[*row[:5], str(row[5])] for row in changed(2, "score", score)]
    fails(write(tmp_path / "sts.csv", rows), rf"row 3 \(STS12\): the score is '{score}'. A finite number is needed")


@pytest.mark.parametrize("column", ["sentence1", "sentence2"])
@pytest.mark.parametrize("cell", [None, "", " \t\n"])
def test_an_empty_sentence(tmp_path, column, cell):
    path = write(tmp_path / "sts.parquet", changed(3, column, cell))
    fails(path, rf"row 4 \(STS12\): {column} is empty, a sentence is needed. Correct or remove the row")


def test_a_sentence_that_is_no_text(tmp_path):
    rows = [(*row[:3], i, *row[4:]) for i, row in enumerate(GOOD, start=7)]
    fails(write(tmp_path / "sts.parquet", rows), r"row 1 \(STS12\): sentence1 is 7, a sentence is needed")


@pytest.mark.parametrize("cell", [None, ""])
def test_a_year_needs_its_subsets(tmp_path, cell):
    fails(write(tmp_path / "sts.parquet", changed(1, "subset", cell)), r"row 2 \(STS12\): the subset is empty")


def test_row_numbers_count_the_whole_file(tmp_path):
    rows = [*ROWS[5:9], *changed(0, "sentence1", "")]
    fails(write(tmp_path / "sts.parquet", rows), r"row 5 \(STS12\)")


def test_bad_rows_of_others_do_no_harm(tmp_path):
    rows = [*GOOD, ("STS13", None, "test", "", None, 1.0), ("STS12", None, "train", "", "", 1.0)]
    assert STS(write(tmp_path / "sts.parquet", rows), ["STS12"], "test")(words)


def test_no_task_is_there(tmp_path):
    message = r"has no test pairs of STS16, SICK-R. It holds: STS12 test.*tasks"
    fails(write(tmp_path / "sts.parquet", GOOD), message, ("STS16", "SICK-R"))


def test_no_rows(tmp_path):
    fails(write(tmp_path / "sts.csv", []), r"has no test pairs of STS12")


def test_constant_gold_scores(tmp_path):
    rows = [(*row[:5], 3.0 if row[1] == "two" else row[5]) for row in GOOD]
    fails(write(tmp_path / "sts.parquet", rows), r"STS12, subset two: fewer than two different gold scores")


def test_no_gold_score_at_all(tmp_path):
    rows = [(*row[:5], float("nan")) for row in GOOD]
    fails(write(tmp_path / "sts.parquet", rows), r"STS12: fewer than two different gold scores")


@pytest.fixture
def hub(monkeypatch):
    """The public sets as mteb stores them, by name and split."""
    asked = []

    def load(name, split):
        asked.append((name, split))
        rows = [row for row in ROWS if row[0] == {"mteb/sts12-sts": "STS12", "mteb/stsbenchmark-sts": "STS-B"}[name]]
        rows = [row for row in rows if row[2] == {"test": "test", "validation": "dev"}[split]]
        return datasets.Dataset.from_dict({c: [r[i] for r in rows] for i, c in enumerate(COLUMNS) if i > 2})

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def test_the_hub_gives_the_same_but_no_subsets(hub, tmp_path):
    tasks = ["STS12", "STS-B"]
    found, local = (STS(path, tasks, "test")(words) for path in ("hub", write(tmp_path / "toy.parquet")))
    renamed = {name.replace("_hub/", "/"): value for name, value in found.items()}
    assert not renamed.keys() & found.keys()  # no name under which a paper's number is expected
    assert renamed.items() < local.items()
    assert local.keys() - renamed.keys() == {
        f"sts/{t}/{kind}_{over}" for t in ("sts12", "avg") for kind in ("spearman", "pearson") for over in ("mean", "wmean")
    }
    table = STS("hub", tasks, "test").table(found)
    assert "of the hub's sets: not the pairs of published tables" in table and "Spearman mean" not in table
    assert hub == [("mteb/sts12-sts", "test"), ("mteb/stsbenchmark-sts", "test")]


def test_the_hubs_dev_is_called_validation(hub):
    STS("hub", ["STS-B"], "dev")(words)
    assert hub == [("mteb/stsbenchmark-sts", "validation")]


def test_a_hub_that_cannot_be_reached(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    fails("hub", r"path=hub: mteb/sts12-sts, split test, cannot be loaded \(.*\). Set path to SentEval's folder or a table")
