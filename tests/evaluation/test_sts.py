import json
import logging
from collections import defaultdict

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
from scipy.stats import pearsonr, spearmanr

from tercet.evaluation import STS, alignment, sts_table, uniformity
from tercet.evaluation.sts import CORRELATIONS, STS_TASKS, _cosine, correlations
from tercet.models import CachedEncoder
from tercet.models.folder import load_folder
from tests.conftest import MINILM
from tests.evaluation.fakes import Counted, broken, collapsed, words

COLUMNS = ("task", "subset", "split", "sentence1", "sentence2", "score")
ROWS = [
    ("STS12", "one", "test", "a b c", "a b d", 3.0),
    ("STS12", "one", "test", "a b", "c d", 0.5),
    ("STS12", "one", "test", "c  d\te ", "c d f", 4.0),
    ("STS12", "two", "test", "g h", "g h", 5.0),
    ("STS12", "two", "test", "g h i", "x y z", 1.0),
    ("STS12", "one", "train", "never seen", "not at all", 1.0),
    ("STS-B", "x", "test", "a dog runs", "a dog ran", 4.4),
    ("STS-B", "y", "test", "a dog runs", "a cat sat", 1.2),
    ("STS-B", "z", "test", "c d e", "c d g", 4.0),
    ("STS-B", "z", "dev", "m n o", "m n p", 4.0),
    ("STS-B", "z", "dev", "m n", "q r s", 2.0),
    ("STS-B", "z", "dev", "m q", "t u", 2.5),
    ("SICK-R", None, "trial", "v w x", "v w y", 3.0),
    ("SICK-R", None, "trial", "v w", "z z", 1.0),
    ("other", "one", "test", "never seen", "", None),
]


def write(path, rows=ROWS, columns=COLUMNS):
    data = pa.table({name: [row[i] for row in rows] for i, name in enumerate(columns)})
    if path.suffix == ".parquet":
        pq.write_table(data, path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in data.to_pylist()), encoding="utf-8")
    elif path.suffix == ".tsv":  # without quotes
        lines = [columns, *(["" if cell is None else str(cell).replace("\t", " ") for cell in row] for row in rows)]
        path.write_text("".join("\t".join(line) + "\n" for line in lines), encoding="utf-8")
    else:
        pyarrow.csv.write_csv(data, path)
    return str(path)


@pytest.fixture
def toy(tmp_path):
    return write(tmp_path / "toy.parquet")


def cosine(a, b):
    """SentEval's, of one pair: a cosine that does not exist is 0."""
    a, b = (words([" ".join(text.split())])[0].double().numpy() for text in (a, b))
    with np.errstate(invalid="ignore"):
        return np.nan_to_num(np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b))).round(12)


def senteval(rows, task, split):
    """The protocol written down once more, subset by subset and pair by pair."""
    by_subset = defaultdict(lambda: ([], []))
    for row in rows:
        if row["task"] == task and row["split"] == split and row["score"] is not None:
            system, gold = by_subset[row["subset"] if task.startswith("STS1") else ""]
            system.append(cosine(row["sentence1"], row["sentence2"]))
            gold.append(float(row["score"]))
    found = {}
    for kind, measure in (("spearman", spearmanr), ("pearson", pearsonr)):
        parts = [measure(system, gold)[0] for system, gold in by_subset.values()]
        sizes = [len(gold) for _, gold in by_subset.values()]
        found[f"{kind}_all"] = measure(
            [s for system, _ in by_subset.values() for s in system], [g for _, gold in by_subset.values() for g in gold]
        )[0]
        found[f"{kind}_mean"] = sum(parts) / len(parts)
        found[f"{kind}_wmean"] = sum(p * n for p, n in zip(parts, sizes, strict=True)) / sum(sizes)
    return found


def test_it_is_sentevals_protocol(toy):
    found = STS(toy, ["STS12", "STS-B"], "test")(words)
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in ROWS]
    years, whole = senteval(rows, "STS12", "test"), senteval(rows, "STS-B", "test")
    for name in CORRELATIONS:
        assert found[f"sts/sts12/{name}"] == pytest.approx(years[name])
        assert found[f"sts/avg/{name}"] == pytest.approx((years[name] + whole[name]) / 2)
    assert len({round(years[name], 6) for name in CORRELATIONS}) == 6  # the toy tells the six apart
    for kind in ("spearman", "pearson"):
        assert len({round(whole[f"{kind}_{over}"], 12) for over in ("all", "mean", "wmean")}) == 1
        assert found[f"sts/stsb/{kind}"] == pytest.approx(whole[f"{kind}_all"])
    extra = {f"sts/stsb/{name}" for name in ("spearman", "pearson", "alignment", "uniformity")}
    assert set(found) == extra | {f"sts/{task}/{name}" for task in ("sts12", "avg") for name in CORRELATIONS}


def test_a_set_without_subsets_has_each_number_once(toy):
    evaluator = STS(toy, ["STS-B"], "dev")
    found = evaluator(words)
    assert list(found) == ["sts/stsb/spearman", "sts/stsb/pearson", "sts/stsb/uniformity"]
    assert [line.split()[0] for line in evaluator.table(found).splitlines()] == ["STS,", "STS-B", "Spearman", "Pearson", "Not"]


def test_geometry_of_the_benchmark(toy):
    """Close pairs are those above 4, not those at 4; uniformity is over distinct sentences."""
    found = STS(toy, ["STS-B"], "test")(words)
    assert found["sts/stsb/alignment"] == pytest.approx(alignment(words(["a dog runs"]), words(["a dog ran"])))
    unique = ["a dog runs", "a dog ran", "a cat sat", "c d e", "c d g"]
    assert found["sts/stsb/uniformity"] == pytest.approx(uniformity(words(unique)))
    assert "sts/stsb/alignment" not in STS(toy, ["STS-B"], "dev")(words)  # no close pair: no number is made up


def test_one_task_has_no_average(toy):
    assert not any("avg" in name for name in STS(toy, ["STS12"], "test")(words))


def test_dev_and_trial_are_one(toy):
    found = STS(toy, ["STS-B", "SICK-R"], "dev")(words)
    assert found["sts/sickr/spearman"] == pytest.approx(1)
    assert found["sts/avg/spearman_all"] == pytest.approx((found["sts/stsb/spearman"] + 1) / 2)


def test_encode_is_called_once_with_clean_distinct_sentences(toy):
    encode = Counted()
    STS(toy, ["STS12", "STS-B"], "test")(encode)
    (sent,) = encode.calls
    assert len(sent) == len(set(sent))
    assert "c d e" in sent
    assert not {"never seen", "m n o", "c  d\te "} & set(sent)


def test_long_sentences_are_not_cut(tmp_path):
    long = " ".join(f"w{i}" for i in range(2000))
    rows = [("STS-B", "", "test", long, long + " end", 5.0), ("STS-B", "", "test", "a", "b", 0.0)]
    encode = Counted()
    STS(write(tmp_path / "long.parquet", rows), ["STS-B"], "test")(encode)
    assert {long, long + " end"} <= set(encode.calls[0])


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_every_format_says_the_same(toy, tmp_path, kind):
    other = write(tmp_path / f"toy.{kind}")
    tasks = ["STS12", "STS-B"]
    assert STS(other, tasks, "test")(words) == STS(toy, tasks, "test")(words)


@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl"])
def test_sentences_that_begin_with_a_quote_take_up_no_others(tmp_path, kind):
    quote = {4: '"', 9: '"', 14: '"'}
    rows = [("STS-B", "", "test", f"{quote.get(i, '')}A man {i}.", f"Someone {i}.", i % 8 * 0.7) for i in range(20)]
    found = STS(write(tmp_path / f"toy.{kind}", rows), ["STS-B"], "test").pairs["STS-B"]
    assert found.first == [row[3] for row in rows]
    assert found.second == [row[4] for row in rows]


def test_na_is_a_sentence(tmp_path):
    rows = [("STS-B", "", "test", "NA", "null", 1.0), ("STS-B", "", "test", "a b", "a b", 5.0)]
    pairs = STS(write(tmp_path / "toy.csv", rows), ["STS-B"], "test").pairs["STS-B"]
    assert (pairs.first, pairs.second) == (["NA", "a b"], ["null", "a b"])


@pytest.mark.parametrize("encode", [collapsed, broken, lambda texts: torch.zeros(len(texts), 3)])
def test_a_model_that_tells_nothing_apart_correlates_zero(toy, encode):
    found = STS(toy, ["STS12", "STS-B"], "test")(encode)
    assert {value for name, value in found.items() if "spearman" in name or "pearson" in name} == {0.0}


def test_the_sign_counts():
    gold, subset = np.array([1.0, 2, 3, 4]), np.array(["a", "a", "b", "b"])
    assert list(correlations(-gold, gold, subset).values()) == pytest.approx([-1] * 6)
    assert set(correlations(gold, gold, None)) == {"spearman_all", "pearson_all"}


def test_a_sentence_with_itself_always_scores_the_same():
    z = torch.randn(500, 24, generator=torch.Generator().manual_seed(0)).double()
    assert set(_cosine(z, z).tolist()) == {1.0}
    assert len(set(_cosine(z, z.flip(0)).tolist())) == 250


def test_missing_tasks_are_left_out_and_said_once(toy, caplog):
    evaluator = STS(toy, ["SICK-R", "STS16", "STS-B", "STS12"], "test")
    with caplog.at_level(logging.WARNING, "tercet"):
        found = evaluator(words)
        evaluator(words)
    assert list(evaluator.pairs) == ["STS12", "STS-B"]
    assert found == STS(toy, ["STS12", "STS-B"], "test")(words)
    missing, counts = [record.message for record in caplog.records]
    assert missing.endswith("has no test pairs of STS16, SICK-R: left out, also of the average.")
    assert "other numbers of pairs than SentEval's (STS12 5 for 3,108, STS-B 3 for 1,379)" in counts


@pytest.mark.parametrize("empty", [None, float("nan"), "", "  "])
def test_rows_without_a_gold_score_are_dropped_and_counted(tmp_path, empty, caplog):
    kind = ".csv" if isinstance(empty, str) else ".parquet"
    rows = [row for row in ROWS if row[0] == "STS12"]
    more = [*rows[:2], ("STS12", "one", "test", "a", "b", empty), *rows[2:]]
    if isinstance(empty, str):
        more = [(*row[:5], str(row[5])) for row in more]
    path = write(tmp_path / f"with{kind}", more)
    with caplog.at_level(logging.WARNING, "tercet"):
        found = STS(path, ["STS12"], "test")(words)
    assert found == STS(write(tmp_path / "without.parquet", rows), ["STS12"], "test")(words)
    assert "1 of 6 pairs of STS12 have no gold score" in caplog.text


def test_the_papers_table(toy):
    evaluator = STS(toy, ["STS12", "STS-B"], "test")
    metrics = {f"sts/{task}/{name}": 0.76254 for task in ("sts12", "avg") for name in CORRELATIONS}
    metrics |= {"sts/stsb/spearman": 0.5, "sts/stsb/pearson": 0.25, "sts/avg/pearson_all": -0.01234, "train/loss": 3.0}
    text = sts_table({f"test/{name}": value for name, value in metrics.items()}, "test/")
    *rows, last = text.splitlines()
    assert [line.split() for line in rows] == [
        ["STS12", "STS-B", "Avg."],
        ["Spearman", "all", "76.25", "50.00", "76.25"],
        ["Spearman", "mean", "76.25", "50.00", "76.25"],
        ["Spearman", "wmean", "76.25", "50.00", "76.25"],
        ["Pearson", "all", "76.25", "25.00", "-1.23"],
    ]
    assert last == "Not measured: STS13, STS14, STS15, STS16, SICK-R. The paper's average is over all 7 tasks."
    assert len({len(line) for line in rows}) == 1
    assert evaluator.table(metrics) == f"STS, test split, x100\n{text}"


def test_a_full_table_names_nothing_missing():
    metrics = {f"sts/{t.lower().replace('-', '')}/spearman_all": 0.5 for t in STS_TASKS} | {"sts/avg/spearman_all": 0.5}
    lines = sts_table(metrics, "").splitlines()
    assert lines[0].split() == [*STS_TASKS, "Avg."]
    assert len(lines) == 2


def test_the_real_data(shared):
    """Pair counts are SentEval's; the numbers are those of the protocol written down once more."""
    path = str(shared / "sts.parquet")
    evaluator = STS(path, list(STS_TASKS), "test")
    found = evaluator(words)
    counts = {task: len(pairs.gold) for task, pairs in evaluator.pairs.items()}
    expected = {"STS12": 3108, "STS13": 1500, "STS14": 3750, "STS15": 3000, "STS-B": 1379}
    assert expected.items() <= counts.items()
    subsets = {task: len(set(pairs.subset)) for task, pairs in evaluator.pairs.items()}
    assert {"STS12": 5, "STS13": 3, "STS14": 6, "STS15": 5, "STS-B": 1}.items() <= subsets.items()
    rows = pq.read_table(path).to_pylist()
    for task in ("STS13", "STS-B"):
        for name, value in senteval(rows, task, "test").items():
            own = name.removesuffix("_all") if task == "STS-B" else name
            if task == "STS13" or own != name:
                assert found[f"sts/{task.lower().replace('-', '')}/{own}"] == pytest.approx(value)
    dev = STS(path, ["STS-B", "SICK-R"], "dev")
    assert {task: len(pairs.gold) for task, pairs in dev.pairs.items()} == {"STS-B": 1500, "SICK-R": 500}


@pytest.mark.slow
def test_a_known_model_scores_what_is_known(shared):
    """all-MiniLM-L6-v2 has 0.820 on STS-B test with its own mean pooling."""
    encode = CachedEncoder(load_folder(MINILM, None)[0])
    found = STS(str(shared / "sts.parquet"), ["STS-B"], "test")(encode)
    assert found["sts/stsb/spearman"] == pytest.approx(0.820, abs=0.0005)
