"""Each private interface of Hydra that ``tercet.app.hydra_compat`` uses still does what it is used for."""

from pathlib import Path

import cloudpickle
import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import ChoiceSweep
from hydra.types import HydraContext, RunMode
from omegaconf import OmegaConf, open_dict

from tercet.app import hydra_compat
from tercet.app.cli import config_folder
from tercet.app.error_formatting import explain
from tests.conftest import composed


@pytest.mark.parametrize("override", ["optimizer=null", "loss=5"])
def test_a_group_that_is_given_no_name(override):
    with pytest.raises(ValueError, match="Config group override") as caught:
        composed(override)
    assert hydra_compat.failed_group(caught.value) == override
    assert explain(caught.value, "train").startswith(f"{override}: the name of a choice")
    assert hydra_compat.failed_group(KeyError("x")) is None


@pytest.mark.parametrize("override", ["~data.columns.0", "~optimizer.betas.1"])
def test_an_override_that_cannot_be_applied_is_named(override):
    with pytest.raises(TypeError) as caught:
        composed("data=text", "data.path=x", "data.columns=[a,b]", override)
    assert hydra_compat.failed_override(caught.value) == override
    assert explain(caught.value, "train").startswith(f"{override}: it cannot be applied (")
    assert hydra_compat.failed_override(KeyError("x")) is None


def test_overrides_are_parsed_as_on_the_command_line():
    fixed, swept, group = hydra_compat.parse_overrides(["a.b=1", "c=x,y", "d@e=f"])
    assert (fixed.get_key_element(), fixed.value(), fixed.is_sweep_override()) == ("a.b", 1, False)
    assert swept.is_sweep_override() and isinstance(swept.value(), ChoiceSweep)
    assert (group.key_or_group, group.package, group.input_line) == ("d", "e", "d@e=f")


@pytest.mark.parametrize("text", ["k=choice('a=b','é (,',c d)", "k='a=b',c", "k=choice([1,2],{a:1})", "k=range(1,3)"])
def test_swept_values_can_be_read_again(text):
    (override,) = hydra_compat.parse_overrides([text])
    again = [hydra_compat.parse_overrides([f"k={value}"])[0].value() for value in hydra_compat.swept_values(override)]
    assert again == [getattr(value, "text", value) for value in override.sweep_iterator()]


@pytest.mark.parametrize("value", ["it's", r"C:\new", r"a\'b\\", "a=b, [c]", "", "1", 1, None, True, ["a", {"b": [0.5, "x"]}]])
def test_a_quoted_value_is_read_as_it_was(value):
    assert hydra_compat.parse_overrides([f"key={hydra_compat.quote(value)}"])[0].value() == value


def test_a_worker_runs_a_job_with_the_pickled_state_of_the_sweep(tmp_path):
    (tmp_path / "conf.yaml").write_text("seed: 1\n")
    overrides = ["seed=2", f"hydra.sweep.dir={tmp_path}", "hydra.sweep.subdir=job", "hydra/job_logging=none"]
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        cfg = compose("conf", overrides, return_hydra_config=True)
    with open_dict(cfg):
        cfg.hydra.mode, cfg.hydra.output_subdir, cfg.hydra.job.num = RunMode.MULTIRUN, None, 0
    state = hydra_compat.process_state()
    try:
        done = hydra_compat.run_worker_job(
            cfg,
            cloudpickle.loads(cloudpickle.dumps(state)),
            HydraContext(config_loader=None, callbacks=Callbacks()),
            lambda job: (job.seed, HydraConfig.get().runtime.output_dir),
        )
    finally:
        hydra_compat.Singleton.set_state(state)
    assert done.return_value == (2, str(tmp_path / "job"))


def test_a_node_knows_its_full_key():
    cfg = OmegaConf.create({"a": {"b": [{"c": {}}]}})
    assert hydra_compat.full_key(cfg.a.b[0].c) == "a.b.0.c"
    assert (hydra_compat.full_key(cfg), hydra_compat.full_key({"a": 1})) == ("", "")


def test_interpolations_are_followed_however_many_there_are():
    raw = composed("data=text", "data.path=my.txt")
    assert hydra_compat.source_key(raw, "data.module.batch_size") == "data.batch_size"
    assert hydra_compat.source_key(raw, "objective.encoder.tokenizer.name") == "model.backbone.name"
    assert hydra_compat.source_key(raw, "no.such.key") == "no.such.key"
    assert hydra_compat.source_key(composed("logger=wandb"), "logger.wandb.name") == "logger.wandb.name"  # of two keys


def test_main_runs_with_the_arguments_given(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["tercet", "not=these"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    (tmp_path / "job.yaml").write_text("defaults: [_self_, override hydra/job_logging: none]\nseed: 1\n")
    found = []

    def job(cfg):
        found.append((cfg.seed, Path(config_folder()) in hydra_compat.config_folders()))

    hydra_compat.run_main(job, str(tmp_path), "job", ["seed=3", f"hydra.run.dir={tmp_path}", f"--config-dir={config_folder()}"])
    assert found == [(3, True)]
