"""Comparison of runs: grouping by overrides, paired bootstrap, and variance explained by each axis."""

import csv
import itertools
import json
import statistics

import pytest

from tercet.app.commands import compare
from tercet.errors import InputError


def lay(folder, seed, metrics, *overrides, optimized=None):
    folder.mkdir(parents=True)
    command = [*overrides, f"seed={seed}"]
    (folder / "config.yaml").write_text(json.dumps({"seed": seed, "command": command, "optimized_metric": optimized}))
    if metrics is not None:
        (folder / "metrics.json").write_text(json.dumps(metrics))


@pytest.fixture
def sweep(tmp_path):
    """Two temperatures and two poolings, three seeds each; ``test/a`` is 10 t + pooling + seed / 100."""
    for i, (t, pooling, seed) in enumerate(itertools.product(("0.1", "0.2"), ("cls", "mean"), (1, 2, 3))):
        value = 10 * float(t) + (pooling == "mean") * 0.5 + seed / 100
        lay(tmp_path / str(i), seed, {"test/a": value, "test/loss": value, "train/x": 1.0},
            "data=x", f"loss.temperature={t}", f"model.pooling={pooling}", f"output_dir={i}")  # fmt: skip
    lay(tmp_path / "0" / "1_stage", 1, {"test/a": 99.0}, "data=y")  # a stage is part of its run
    lay(tmp_path / "12", 4, None, "data=x")
    return tmp_path


def test_settings_are_what_the_commands_set_differently(sweep, capsys):
    compared = compare.group_runs(compare.read_runs([sweep]))
    assert "1 runs have not finished" in capsys.readouterr().err
    assert compared.axes == ("loss.temperature", "model.pooling")
    assert {s: len(r) for s, r in compared.runs.items()} == dict.fromkeys(itertools.product(("0.1", "0.2"), ("cls", "mean")), 3)
    assert next(iter(compared.rank("test/a"))) == ("0.2", "mean")
    assert next(iter(compared.rank("test/loss"))) == ("0.1", "cls"), "less of a loss is better"
    assert compared.metrics() == ["test/a", "test/loss"]


def test_the_table_names_the_best_and_what_explains_it(sweep):
    compared = compare.group_runs(compare.read_runs([sweep]))
    text = compare.comparison_text(compared, ["test/a"])
    first = text.splitlines()[2].split()
    assert first[:3] == ["0.2", "mean", "3"] and "2.5200 ± 0.0100" in text
    assert "+0.5000 [+0.5000, +0.5000]" in text, "the seeds are paired: what they share cancels"
    shares = [float(line.split("explains ")[1].split("%")[0]) for line in text.splitlines() if "explains" in line]
    assert shares == [80, 20]  # (10 · 0.1)² against 0.5², halved both
    assert "best run" in text and "loss.temperature=0.2 model.pooling=mean" in text


def test_the_sentence_says_who_is_ahead_and_whether_it_is_sure(tmp_path):
    for setting, values in {"1": (1.0, 1.2, 1.1), "2": (1.1, 1.1, 1.1), "3": (0.1, 0.2, 0.3)}.items():
        for seed, value in enumerate(values):
            lay(
                tmp_path / f"{setting}{seed}",
                seed,
                {"test/a": value + (setting == "1") * 0.01, "test/loss": value},
                f"x={setting}",
            )
    sentence = compare.describe_best(compare.group_runs(compare.read_runs([tmp_path])), "test/a")
    assert sentence.startswith("x=1: test/a 1.1100 ± 0.1000, not surely ahead of x=2 by +0.0100 [")
    two = compare.group_runs([r for r in compare.read_runs([tmp_path]) if r.overrides["x"] != "2"])
    assert "x=3: test/loss 0.2000 ± 0.1000, ahead of x=1 by -0.9" in compare.describe_best(two, "test/loss")


@pytest.mark.parametrize("n", [2, 3, 5])
def test_the_bootstrap_of_few_seeds_is_the_whole_distribution(n):
    d = [0.3, -0.1, 0.2, 0.05, -0.4][:n]
    means = sorted(statistics.fmean(pick) for pick in itertools.product(d, repeat=n))
    mean, low, high, share = compare.paired_bootstrap(d)
    assert mean == pytest.approx(statistics.fmean(d))
    assert share == pytest.approx(sum((m > 1e-12) + (abs(m) < 1e-12) / 2 for m in means) / len(means), abs=1e-2)
    assert means[0] <= low <= mean <= high <= means[-1]


def test_all_metrics_of_all_runs_are_in_the_csv(sweep, tmp_path):
    compared = compare.group_runs(compare.read_runs([sweep]))
    compare.write_comparison(compared, compared.metrics(), tmp_path)
    rows = list(csv.DictReader((tmp_path / "comparison.csv").open()))
    assert len(rows) == 12 and set(rows[0]) >= {"loss.temperature", "seed", "folder", "test/a", "train/x"}
    assert (tmp_path / "comparison.png").stat().st_size > 5000


def test_one_optimized_metric_is_the_table(tmp_path):
    lay(tmp_path / "a", 1, {"test/a": 1.0, "test/b": 2.0}, "x=1", optimized="test/b")
    lay(tmp_path / "b", 1, {"test/a": 1.0, "test/b": 3.0}, "x=2", optimized="test/b")
    compared = compare.group_runs(compare.read_runs([tmp_path / "a", tmp_path / "b"]))
    assert compared.metrics() == ["test/b"]
    assert "no two seeds in common" in compare.comparison_text(compared, compared.metrics())


def test_a_folder_without_runs_is_named(tmp_path):
    with pytest.raises(InputError, match="no finished run"):
        compare.read_runs([tmp_path])
    with pytest.raises(InputError, match="no such folder"):
        compare.read_runs([tmp_path / "none"])


def test_a_sweep_is_summed_up():
    runs = [{"test/a": 1.0, "before/a": 0.0, "train/loss": 9.0}, {"test/a": 3.0, "before/a": 0.0}]
    table = compare.summarize(runs)
    assert table["test/a"] == {"mean": 2.0, "sd": pytest.approx(2**0.5), "runs": 2}
    assert "train/loss" not in table
    assert "0.0000 ± 0.0000  →     2.0000 ± 1.4142" in compare.summary_table(table, 2)
    stages = compare.summary_table({**table, "first/a": table["before/a"]}, 2, ["first"]).splitlines()
    assert stages[1].split() == ["before", "→", "first", "→", "after"] and stages[2].count("→") == 2
