import pytest
from omegaconf import OmegaConf

from tests.conftest import choices, composed

CHOICES = choices("evaluation")


def test_all_are_there():
    assert {"sts", "stsb_dev", "retrieval", "alignment_uniformity", "heldout"} <= set(CHOICES)


@pytest.mark.parametrize("member", ["retrieval", "alignment_uniformity"])
def test_held_out_means_the_held_out_side(member):
    config = OmegaConf.to_container(composed("evaluation@test=heldout").test, resolve=False)["members"][member]
    assert (config["name"], config["source"]) == ("${data.name}", "${data.test}")


def test_sts_is_simcses():
    test, dev = composed("evaluation@test=sts").test, composed("evaluation@test=stsb_dev").test
    assert list(test.tasks) == ["STS12", "STS13", "STS14", "STS15", "STS16", "STS-B", "SICK-R"]
    assert (test.split, dev.split, list(dev.tasks)) == ("test", "dev", ["STS-B"])


@pytest.mark.parametrize("evaluation", ["nearest_neighbor", "clustering"])
@pytest.mark.parametrize("data", ["table", "images"])
def test_labels_are_measured_on_held_out_texts_and_images(evaluation, data):
    """Nothing of training is needed: no batches, no tokenizer, no pixels."""
    cfg = composed(f"evaluation={evaluation}", f"data={data}", "data.name=mine", "data.path=x", entry="evaluate")
    found = OmegaConf.to_container(cfg.evaluation, resolve=True)
    assert (found["source"]["path"], found["source"]["split"]) == ("x", "test")


def test_verification_takes_any_faces_pairs_and_folds():
    options = ("evaluation=verification", "evaluation.path=lfw", "evaluation.pairs=pairs.txt", "evaluation.folds=[1,2,3]")
    found = OmegaConf.to_container(composed(*options, entry="evaluate").evaluation, resolve=True)
    assert (found["path"], found["pairs"], found["folds"]) == ("lfw", "pairs.txt", [1, 2, 3])
