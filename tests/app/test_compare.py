"""Comparison of runs: grouping by overrides, uncertainty over seeds and over examples, variance explained by each axis."""

import csv
import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from tercet.app import examples
from tercet.app.commands import compare
from tercet.app.sweeps import summary
from tercet.errors import InputError
from tercet.evaluation.significance import holm, randomization_test


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


def test_a_metric_may_be_infinite(sweep):
    """A perplexity is, where the loss is large."""
    first = json.loads((sweep / "0" / "metrics.json").read_text())
    (sweep / "0" / "metrics.json").write_text(json.dumps({**first, "test/loss": float("inf")}))
    compared = compare.group_runs(compare.read_runs([sweep]))
    table = compare.comparison_text(compared, ["test/loss"]).splitlines()
    assert any(line.split()[:4] == ["0.1", "cls", "3", "inf"] for line in table)
    assert compare.draw_comparison(compared, ["test/loss"]).axes
    assert summary.summarize([{"test/loss": float("inf")}, {"test/loss": 1.0}])["test/loss"]["mean"] == float("inf")


def test_the_table_names_the_best_and_what_explains_it(sweep):
    compared = compare.group_runs(compare.read_runs([sweep]))
    text = compare.comparison_text(compared, ["test/a"])
    first = text.splitlines()[2].split()
    assert first[:3] == ["0.2", "mean", "3"] and "2.5200 ± 0.0100" in text
    assert "+0.5000 [+0.5000, +0.5000]" in text, "the seeds are paired: what they share cancels"
    shares = [float(line.split("explains ")[1].split("%")[0]) for line in text.splitlines() if "explains" in line]
    assert shares == [80, 20]  # (10 · 0.1)² against 0.5², halved both
    assert "best run" in text and "loss.temperature=0.2 model.pooling=mean" in text


def lay_settings(folder, settings, metric="test/a", **more):
    for setting, values in settings.items():
        for seed, value in enumerate(values):
            lay(folder / f"{setting}{seed}", seed, {metric: value, "test/loss": value}, f"x={setting}", **more)
    return compare.group_runs(compare.read_runs([folder]))


def test_the_sentence_says_who_is_ahead_and_whether_it_is_sure(tmp_path):
    compared = lay_settings(tmp_path, {"1": (1.01, 1.21, 1.11), "2": (1.1, 1.1, 1.1), "3": (0.1, 0.301, 0.2)})
    sentence = compare.describe_best(compared, "test/a")
    assert sentence.startswith(
        "x=1: test/a 1.1100 ± 0.1000, not surely ahead of x=2 by +0.0100 [-0.2384, +0.2584] over 3 seeds"
    )
    assert "p 0.88 corrected for 3 pairs of settings" in sentence
    assert "x=3: test/loss 0.2003 ± 0.1005, ahead of x=2 by -0.8997" in compare.describe_best(compared, "test/loss")
    rows = compare.ranking_table(compared, "test/a").splitlines()
    assert [row.split()[0] for row in rows[2:]] == ["1", "2", "3"]
    assert not rows[3].endswith("behind") and rows[4].endswith("behind"), "all three seeds agree to a thousandth"
    assert "sign test" in rows[1] and " 0.75 " in rows[4], "0.25, for three pairs"


def test_one_seed_is_no_verdict(tmp_path):
    compared = lay_settings(tmp_path, {"1": (2.0,), "2": (1.0,)})
    assert compare.describe_best(compared, "test/a").endswith("before x=2 (no two seeds in common: this is no verdict).")
    assert "behind" not in compare.ranking_table(compared, "test/a")


def test_two_seeds_are_no_verdict_however_close_they_are(tmp_path):
    compared = lay_settings(tmp_path, {"1": (0.7102, 0.7202), "2": (0.7001, 0.7099)})
    sentence = compare.describe_best(compared, "test/a")
    assert sentence.endswith("before x=2 (+0.0102 [+0.0089, +0.0115] over 2 seeds: this is no verdict).")
    assert "behind" not in compare.ranking_table(compared, "test/a")


def test_of_runs_with_one_setting_and_seed_the_latest_counts(tmp_path, capsys):
    lay_settings(tmp_path, {"1": (0.9,), "2": (0.5,)})
    lay(tmp_path / "again", 0, {"test/a": 0.1}, "x=1")
    os.utime(tmp_path / "again" / "metrics.json", (1, 1))
    assert compare.group_runs(compare.read_runs([tmp_path])).rank("test/a") == {("1",): {0: 0.9}, ("2",): {0: 0.5}}
    assert "1 runs repeat the setting and the seed of others; the latest of each is compared" in capsys.readouterr().err
    os.utime(tmp_path / "again" / "metrics.json")
    assert compare.group_runs(compare.read_runs([tmp_path])).rank("test/a") == {("2",): {0: 0.5}, ("1",): {0: 0.1}}


@pytest.mark.parametrize(("settings", "seeds"), [(2, 3), (4, 5)])
def test_equal_settings_are_rarely_called_ahead(settings, seeds):
    rng, false = np.random.default_rng(settings * seeds), 0
    for _ in range(400):
        values = rng.normal(size=(settings, seeds)) + rng.normal(size=seeds)
        runs = [compare.Run(Path(), j, {"test/a": x}, {"x": str(i)}, "", None) for (i, j), x in np.ndenumerate(values)]
        false += any(lead.is_sure for lead in compare.group_runs(runs).leads("test/a").values())
    assert false <= 24


def test_other_examples_are_another_uncertainty(tmp_path):
    compared = lay_settings(tmp_path, {"1": (0.8, 0.8), "2": (0.5, 0.5)})
    assert "examples" not in compare.ranking_table(compared, "test/a").splitlines()[1], "no run has values by example"
    compare.compare_examples.cache_clear()
    rng = np.random.default_rng(0)
    for i, folder in enumerate(sorted(tmp_path.iterdir())):
        values = {"a": (rng.uniform(size=200) < (0.8 if i < 2 else 0.5)).astype("float32")}
        np.savez_compressed(folder / examples.EXAMPLES, **values)
    lead = compared.leads("test/a")[("2",)]
    assert lead.examples_p < 0.001
    head, *_, row = compare.ranking_table(compared, "test/a").splitlines()[1:]
    assert "examples" in head and "0.0001" in row, "none of 9,999 resamples is so far apart"
    for other in ({"a": np.ones(7)}, {"a": np.ones(200), examples.TEST_SET: np.zeros(16, np.uint8)}):
        np.savez_compressed(tmp_path / "20" / examples.EXAMPLES, **other)
        np.savez_compressed(tmp_path / "10" / examples.EXAMPLES, a=np.ones(200), **{examples.TEST_SET: np.ones(16, np.uint8)})
        compare.compare_examples.cache_clear()
        assert compared.leads("test/a")[("2",)].examples_p is None, "other examples"


def test_examples_are_corrected_for_all_pairs_of_settings_by_holm(tmp_path):
    compared = lay_settings(tmp_path, {"1": (0.6, 0.6), "2": (0.55, 0.55), "3": (0.5, 0.5)})
    compare.compare_examples.cache_clear()
    values = np.random.default_rng(0).normal(loc=[[0.6], [0.4], [0.1]], size=(3, 100))
    for i, folder in enumerate(sorted(tmp_path.iterdir())):
        np.savez_compressed(folder / examples.EXAMPLES, a=values[i // 2])
    raw = [randomization_test(values[i], values[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    leads = compared.leads("test/a")
    assert [leads[("2",)].examples_p, leads[("3",)].examples_p] == pytest.approx(holm(raw)[:2])


def test_what_validation_chose_is_tested_and_not_ranked_by_its_test(tmp_path):
    for setting, value, test in (("1", 0.9, 0.5), ("2", 0.8, 0.7)):
        for seed in (1, 2):
            metrics = {"val/a": value + seed / 100, "test/a": test, "test/b": 0.25}
            lay(tmp_path / f"{setting}{seed}", seed, metrics, f"x={setting}", optimized="val/a")
    compared = compare.group_runs(compare.read_runs([tmp_path]))
    assert compared.metrics() == ["val/a"]
    text = compare.comparison_text(compared, compared.metrics())
    assert "tests of x=1, which val/a has chosen:\n  test/a  0.5000 ± 0.0000\n  test/b  0.2500" in text


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


def test_a_callback_that_changes_training_is_a_setting_and_one_that_draws_is_not(tmp_path):
    for i, more in enumerate((["callback=hard_labels"], ["callback.figures=null"])):
        lay(tmp_path / str(i), 1, {"test/a": 1.0}, "data=x", *more)
    assert compare.group_runs(compare.read_runs([tmp_path])).axes == ("callback",)


def test_a_folder_without_runs_is_named(tmp_path):
    with pytest.raises(InputError, match="no finished run"):
        compare.read_runs([tmp_path])
    with pytest.raises(InputError, match="no such folder"):
        compare.read_runs([tmp_path / "none"])


def test_the_jobs_of_a_sweep_are_found_by_what_they_wrote(tmp_path, capsys):
    """``hydra.sweep.subdir`` may be anything, also several folders deep, with what Hydra makes of the overrides."""
    names = ["lr=0.1,é", "deep/lr=0.2", "killed"]
    for seed, (name, metrics) in enumerate(zip(names, [{"test/a": 1.0}, {"test/a": 3.0}, None], strict=True)):
        lay(tmp_path / name, seed, metrics)
    (tmp_path / "failed (1)").mkdir()
    (tmp_path / "failed (1)" / "error.txt").write_text("no memory")
    stages = OmegaConf.create({"runs": {}})
    assert not summary.summarize_sweep(tmp_path, stages)
    said = capsys.readouterr().err
    assert "mean ± sd over 2 runs" in said and "job killed has not finished" in said
    assert f"job failed (1) failed: {tmp_path / 'failed (1)' / 'error.txt'}" in said
    assert json.loads((tmp_path / "summary.json").read_text())["test/a"]["mean"] == 2
    (tmp_path / "failed (1)" / "error.txt").unlink()
    assert summary.summarize_sweep(tmp_path, stages)


def test_a_sweep_is_summed_up():
    runs = [{"test/a": 1.0, "before/a": 0.0, "train/loss": 9.0}, {"test/a": 3.0, "before/a": 0.0}]
    table = summary.summarize(runs)
    assert table["test/a"] == {"mean": 2.0, "sd": pytest.approx(2**0.5), "runs": 2}
    assert "train/loss" not in table
    assert "0.0000 ± 0.0000  →     2.0000 ± 1.4142" in summary.summary_table(table, 2)
    stages = summary.summary_table({**table, "first/a": table["before/a"]}, 2, ["first"]).splitlines()
    assert stages[1].split() == ["before", "→", "first", "→", "after"] and stages[2].count("→") == 2
