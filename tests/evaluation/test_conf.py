import dataclasses

import pytest
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from tests.conftest import choices, composed

CHOICES = choices("evaluation")


def nodes(config):
    """Every part of a configuration that has a target."""
    for part in config.values() if isinstance(config, DictConfig) else []:
        yield from nodes(part)
    if isinstance(config, DictConfig) and "_target_" in config:
        yield config


def test_all_are_there():
    assert {"sts", "stsb_dev", "retrieval", "geometry", "heldout"} <= set(CHOICES)


@pytest.mark.parametrize("choice", CHOICES)
def test_a_yaml_names_the_parameters_of_its_target_and_only_those(choice):
    config = composed(f"evaluation@test={choice}").test
    found = [part for part in nodes(config) if part._target_.startswith("tercet.evaluation.")]
    assert found
    for part in found:
        wanted = {field.name for field in dataclasses.fields(get_class(part._target_))}
        assert set(part) - {"_target_"} == wanted


@pytest.mark.parametrize("choice", ["retrieval", "geometry"])
def test_the_source_is_the_held_out_side(choice):
    config = OmegaConf.to_container(composed(f"evaluation@test={choice}").test, resolve=False)
    assert (config["name"], config["source"]) == ("${data.name}", "${data.test}")


def test_sts_is_simcses():
    test, dev = composed("evaluation@test=sts").test, composed("evaluation@test=stsb_dev").test
    assert list(test.tasks) == ["STS12", "STS13", "STS14", "STS15", "STS16", "STS-B", "SICK-R"]
    assert (test.split, dev.split, list(dev.tasks)) == ("test", "dev", ["STS-B"])
