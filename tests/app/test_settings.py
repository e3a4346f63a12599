"""Values of keys: each is right, or refused with its key before anything is read."""

import pytest
import torch
from omegaconf import OmegaConf

from tercet.app import components
from tercet.app.cli import COMMANDS
from tercet.app.components import check_settings, check_values, start_record
from tercet.app.config_checks import _optimizer, set_derived
from tercet.app.error_formatting import explain
from tercet.app.hydra_compat import parse_overrides
from tercet.app.launch import set_precision
from tercet.errors import InputError
from tercet.types import Evaluator
from tests.conftest import CONF, composed, tiny

TEXT = ("data=text", "data.path=my.txt")


def told(*overrides):
    """The message for a run with these overrides of its keys; None where they are accepted. Composing anew takes long."""
    cfg = composed(*tiny(*TEXT))
    for override in parse_overrides(overrides):
        OmegaConf.update(cfg, override.key_or_group, override.value(), force_add="._" in override.key_or_group)
    start_record(cfg)
    try:
        check_settings(cfg)
        resolved = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
        set_derived(resolved)
        check_values(resolved, cfg)
        _optimizer(cfg)
    except Exception as error:
        return explain(error, "train")
    return None


@pytest.mark.parametrize(("override", "accepted"), [
    ("trainer.max_steps=0", "1 or more, or -1"), ("trainer.max_steps=-2", "1 or more, or -1"),
    ("trainer.max_epochs=0", "1 or more"),
    ("trainer.accumulate_grad_batches=0", "1 or more"), ("trainer.log_every_n_steps=0", "1 or more"),
    ("trainer.gradient_clip_val=-1", "0 or more"), ("trainer.gradient_clip_val=nan", "finite"), ("optimizer.lr=inf", "finite"),
    ("optimizer.lr=-1", "above 0"), ("optimizer.weight_decay=nan", "finite"), ("optimizer.weight_decay=-1", "0 or more"),
    ("optimizer.betas=[0.9]", "2 values"), ("optimizer.betas=[0.9,1.5]", "below 1"), ("optimizer.eps=-1", "0 or more"),
    ("scheduler.warmup=2", "below 1"), ("objective.mlm.weight=nan", "finite"), ("loss.temperature=inf", "finite"),
    ("seed=-1", "from 0 to 4294967295"), ("seed=4294967296", "from 0 to 4294967295"), ("seed=1.5", "a whole number"),
    ("num_threads=-1", "from 1"), ("num_threads=0", "from 1"), ("num_threads=all", "a whole number or null"),
    ("keep_last=abc", "a whole number"), ("keep_last=0", "from 1"), ("expected=null", "a group of keys"),
    ("check=no", "true or false"),
    ("resume=no", "true or false"), ("resume=1", "true or false"), ("measure_before=off", "true or false"),
    ("monitor=5", "text or null"),
    ("init_from=[a]", "text or null"), ("stages.runs=null", "a group of keys"), ("stages=a", "a group of keys"),
    ("trainer.detect_anomaly=no", "true or false"),
    ("data.workers=1.5", "a whole number"), ("data.columns=text", "a list"), ("model.normalize=no", "true or false"),
    ("loss._target_=tercet.losses.Nothing", "cannot be imported"), ("loss._target_=tercet.losses", "a class or function"),
    ("loss=5", "a component"), ("callback.best=5", "a component"),
    ("loss._partial_=true", "the component itself"), ("callback.best._partial_=true", "the component itself"),
    ("optimizer._partial_=abc", "true or false"), ("loss._args_=5", "a list"),
    ("model=null", "a group of keys"),
])  # fmt: skip
def test_a_value_that_is_not_accepted_is_named_with_its_key(override, accepted):
    message = told(override)
    assert message is not None
    assert message.replace(", ", ",").replace("'", "").startswith(override), message
    assert accepted in message
    assert "TERCET_DEBUG" not in message


@pytest.mark.parametrize("overrides", [
    (), ("trainer.max_steps=-1", "trainer.max_epochs=3"), ("seed=0",), ("num_threads=2",), ("resume=true", "check=false"),
    ("optimizer.weight_decay=0.01", "optimizer.betas=[0.9,0.98]"), ("data.columns=[1,b]",), ("monitor=val/x",),
    ("save_every=10m",),
    ("trainer.devices=[0,1]",), ("trainer.limit_train_batches=0.5",),
])  # fmt: skip
def test_good_values_are_accepted(overrides):
    assert told(*overrides) is None


def test_a_missing_part_is_named():
    cfg = composed(*tiny(*TEXT))
    start_record(cfg)
    del cfg.optimizer.lr
    with pytest.raises(Exception) as caught:
        _ = cfg.optimizer.lr
    assert explain(caught.value, "train").startswith("optimizer.lr is needed")


def test_limits_are_of_keys_that_exist():
    known = {key for command in COMMANDS if (CONF / f"{command}.yaml").is_file()
             for key, _ in components.walk(OmegaConf.to_container(composed(entry=command), resolve=False))}  # fmt: skip
    assert {*components.LIMITS, *components.SETTINGS} <= known


def test_infinite_numbers_are_refused_wherever_they_are():
    with pytest.raises(InputError, match=r"^model\.pixels\.mean\.0=nan: a finite number"):
        check_settings(composed("model=resnet_small", "data=images", "data.path=x", "model.pixels.mean=[nan]"))


def test_a_target_that_makes_something_else_is_named():
    cfg = composed(*tiny(*TEXT))
    cfg.loss = {"_target_": "builtins.object"}
    start_record(cfg)
    with pytest.raises(Exception) as caught:
        components.build(cfg.objective)
    assert explain(caught.value, "train") == "loss: Module or null is needed, its _target_ makes object."


def part(size: int | None = None, names: list[str] | None = None, parts: dict[str, float | str] | None = None) -> tuple:
    """A target whose parameters have annotations."""
    return size, names, parts


@pytest.mark.parametrize(("values", "message"), [
    ({"size": "os.getcwd"}, "outer.size: a whole number or null is needed, its _target_ makes text."),
    ({"size": "os.getpid", "names": "builtins.list", "parts": "builtins.dict"}, None),
    ({"size": "builtins.list"}, "outer.size: a whole number or null is needed, its _target_ makes a list."),
    ({"names": ["os.getcwd", "os.getpid"]}, "outer.names.1: text is needed, its _target_ makes a whole number."),
    ({"names": ["os.getcwd", "builtins.object"]}, "outer.names.1: text is needed, its _target_ makes object."),
    ({"parts": {"a": "os.getcwd", "b": "builtins.bool"}},
     "outer.parts.b: a number or text is needed, its _target_ makes true or false."),
])  # fmt: skip
def test_plain_values_that_a_target_makes_are_checked_too(values, message):
    def targets(value):
        if isinstance(value, str):
            return {"_target_": value}
        return [targets(x) for x in value] if isinstance(value, list) else {name: targets(x) for name, x in value.items()}

    node = OmegaConf.create({"outer": {"_target_": f"{__name__}.part", **targets(values)}})
    start_record(node)
    if message is None:
        components.build(node.outer)
        return
    with pytest.raises(InputError) as caught:
        components.build(node.outer)
    assert str(caught.value) == message


@pytest.mark.parametrize(("override", "message"), [
    ("callback.best=${seed}", "callback.best=1: a component is needed"),
    ("stages=${seed}", "stages=1: a group of keys is needed"),
    ("seed=${name}", "seed=test: a whole number is needed"),
    ("keep_last=${stages.in_domain}", "keep_last=null: a whole number is needed"),
    ("seed=${keep_last}", None),
    ("seed=${no_such_key}", "Interpolation key 'no_such_key' not found"),
])  # fmt: skip
def test_what_an_interpolation_refers_to_is_checked_where_it_stands(override, message):
    found = told(override)
    assert found is None if message is None else message in str(found), found


class Group:
    """A target that takes components by name, and in a list."""

    def __init__(self, members: dict[str, Evaluator], more: list[Evaluator] | None = None) -> None:
        self.members, self.more = members, more


MEMBER = {"_target_": "tercet.evaluation.STS", "path": "sts.parquet"}


@pytest.mark.parametrize(("given", "message"), [
    ({"members": {"a": MEMBER}, "more": [MEMBER]}, None),
    ({"members": {"a": {"new": 1}}}, "outer.members={'a': {'new': 1}}: a group of keys, each of them Evaluator, is"),
    ({"members": {"a": MEMBER, "b": {"new": 1}}}, "outer.members.b={'new': 1}: Evaluator is needed here"),
    ({"members": {"a": MEMBER}, "more": [MEMBER, 5]}, "outer.more.1=5: Evaluator is needed here, this is a whole number."),
])  # fmt: skip
def test_what_stands_among_components_is_one(given, message):
    cfg = OmegaConf.create({"outer": {"_target_": f"{__name__}.Group", **given}})
    start_record(cfg)
    if message is None:
        check_values(cfg, cfg)
        return
    with pytest.raises(InputError) as caught:
        check_values(cfg, cfg)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(("change", "message"), [
    ({"_partial_": False}, "optimizer._target_=adamw: missing a required argument: 'module'. Training gives it: optimizer."),
    ({"_args_": [1, 2]}, "optimizer._target_=adamw: multiple values for argument 'lr'."),
])  # fmt: skip
def test_an_argument_that_is_not_given_is_named(change, message):
    cfg = composed(*tiny(*TEXT))
    cfg.optimizer = {**OmegaConf.to_container(cfg.optimizer), "_partial_": False, **change}
    start_record(cfg)
    with pytest.raises(InputError) as caught:
        components.build(cfg.optimizer)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("accelerator", "there", "half", "expected"),
    [("auto", True, True, "bf16-mixed"), ("gpu", True, True, "bf16-mixed"), ("cpu", True, True, "32-true"),
     ("auto", False, False, "32-true"), ("gpu", True, False, "32-true")],
)  # fmt: skip
def test_the_precision_is_that_of_the_device(accelerator, there, half, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: half or including_emulation)
    cfg = composed(f"trainer.accelerator={accelerator}")
    set_precision(cfg)
    assert cfg.trainer.precision == expected
    given = composed(f"trainer.accelerator={accelerator}", "trainer.precision=16-mixed")
    set_precision(given)
    assert given.trainer.precision == "16-mixed"
