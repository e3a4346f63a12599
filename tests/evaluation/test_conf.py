import pytest
from omegaconf import OmegaConf

from tests.conftest import choices, composed

CHOICES = choices("evaluation")


def test_all_are_there():
    assert {"sts", "stsb_dev", "retrieval", "geometry", "heldout"} <= set(CHOICES)


@pytest.mark.parametrize("member", ["retrieval", "geometry"])
def test_held_out_means_the_held_out_side(member):
    config = OmegaConf.to_container(composed("evaluation@test=heldout").test, resolve=False)["members"][member]
    assert (config["name"], config["source"]) == ("${data.name}", "${data.test}")


def test_sts_is_simcses():
    test, dev = composed("evaluation@test=sts").test, composed("evaluation@test=stsb_dev").test
    assert list(test.tasks) == ["STS12", "STS13", "STS14", "STS15", "STS16", "STS-B", "SICK-R"]
    assert (test.split, dev.split, list(dev.tasks)) == ("test", "dev", ["STS-B"])
