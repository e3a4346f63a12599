"""Settings are chosen on validation: in every experiment, on rows that are neither trained on nor tested."""

from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from tercet.app.commands import train
from tercet.app.components import find_targets
from tercet.app.config_checks import _reads_test_rows, check_config
from tercet.training import SimCSEUnsup
from tests.conftest import choices, composed

EXPERIMENTS = choices("experiment")
SUITES = {
    "STS": "sts",
    "Retrieval": "retrieval",
    "NearestNeighbor": "nearest_neighbor",
    "AdjacentSentences": "adjacent_sentences",
}


def measured(cfg):
    """How the names of a configuration's validation metrics begin, each with the source that it is measured on."""
    for _, node in find_targets(OmegaConf.to_container(cfg.validation, resolve=True)):
        if (kind := node["_target_"].rsplit(".", 1)[-1]) == "STS":
            assert node["split"] == "dev"
            yield from ((f"val/sts/{task.lower().replace('-', '')}/", None) for task in node["tasks"])
        elif kind in SUITES:
            yield f"val/{SUITES[kind]}/{node['name']}/", node["source"]
    if held_out := OmegaConf.select(cfg, "objective.held_out"):
        yield "val/mlm/", OmegaConf.to_container(held_out, resolve=True)


def settings(node, *keys):
    """Their values in a source and in those that it reads."""
    return [[part.get(key) for key in keys] for _, part in find_targets(node or {})]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_is_chosen_on_validation(experiment):
    cfg = composed(f"experiment={experiment}", *(["data.path=mine"] if experiment == "facenet" else []))
    assert cfg.monitor is None or cfg.monitor.startswith("val/")
    if cfg.stages.runs:  # the metric is that of its last stage
        cfg = composed(
            f"experiment={list(cfg.stages.runs.values())[-1].experiment}", f"optimized_metric={cfg.optimized_metric}"
        )
    assert not _reads_test_rows(cfg.validation)
    (source,) = (source for begin, source in measured(cfg) if str(cfg.optimized_metric).startswith(begin))
    data = OmegaConf.to_container(cfg.data, resolve=True)
    if source is not None:
        assert source == data["validation"] and source not in (data["train"], data["test"])
        splits = [settings(data[side], "split", "books", "where") for side in ("train", "validation", "test")]
        assert splits[0] != splits[1] != splits[2] != splits[0]
        rows = [settings(data[side], "validation_rows") for side in ("train", "validation")]
        assert rows[0] == rows[1], "training leaves out what validation takes"


def test_a_test_metric_that_is_optimized_is_warned_about(caplog, tmp_path):
    class Data:
        name, columns = "listed", ("a",)

    for metric in ("val/sts/stsb/spearman", "test/sts/stsb/spearman"):
        check_config(composed("data=text", "data.path=x", f"optimized_metric={metric}"), SimCSEUnsup, Data())
    assert [r.message.startswith("optimized_metric=test/") for r in caplog.records] == [True]


@pytest.mark.parametrize(("validation", "is_test"), [("heldout", True), ("sts", True), ("stsb_dev", False)])
def test_validation_on_test_rows_is_warned_about(validation, is_test, caplog):
    class Data:
        name, columns = "listed", ("a",)

    metric = "val/retrieval/text/mrr" if validation == "heldout" else "val/sts/stsb/spearman"
    chosen = [f"evaluation@validation={validation}", f"monitor={metric}", f"optimized_metric={metric}"]
    check_config(composed("data=text", "data.path=x", *chosen), SimCSEUnsup, Data())
    warned = [record.message for record in caplog.records if "reads rows with split=test" in record.message]
    assert len(warned) == is_test


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_validation_rows_are_counted_where_there_are_some(name, monkeypatch):
    monkeypatch.setattr(train, "build", lambda node: SimpleNamespace(rows=lambda: range(7)))
    cfg = composed(f"experiment={name}")
    assert train.count_validation_rows(cfg) == (7 if OmegaConf.select(cfg, "data.validation_rows") else None)
