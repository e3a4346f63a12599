"""Optimizer and schedule."""

import pytest
import torch

from tercet.app.components import build
from tercet.errors import InputError
from tercet.training.optimizers import TIMED_STEPS, adamw, end_with_time, make_scheduler, parameter_groups
from tests.conftest import composed, tiny


def test_every_weight_is_in_one_group_and_vectors_do_not_decay(encoder):
    groups = parameter_groups(encoder, lr=1.0, weight_decay=0.1, layer_decay=1.0)
    grouped = [p for group in groups for p in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, encoder.parameters()))
    for group in groups:
        for p in group["params"]:
            assert group["weight_decay"] == (0.1 if p.ndim > 1 else 0.0)


def test_the_rate_falls_by_layer():
    encoder = build(composed(*tiny("model.head.kind=mlp")).model)
    rate = {id(p): g["lr"] for g in parameter_groups(encoder, 1.0, 0.0, 0.5) for p in g["params"]}
    rates = {name: rate[id(p)] for name, p in encoder.named_parameters()}
    assert rates["head.layer.0.weight"] == 1.0
    assert rates["backbone.encoder.layer.1.output.dense.weight"] == 1.0
    assert rates["backbone.encoder.layer.0.output.dense.weight"] == 0.5
    assert rates["backbone.embeddings.word_embeddings.weight"] == 0.25


def at(shape, warmup, steps=100):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    made, rates = make_scheduler(optimizer, steps, shape, warmup), []
    for _ in range(steps):
        rates.append(made.get_last_lr()[0])
        optimizer.step()
        made.step()
    return rates


def test_schedules_have_their_shapes():
    linear, cosine, constant = (at(shape, 0.1) for shape in ("linear", "cosine", "constant"))
    for rates in (linear, cosine, constant):
        assert rates[:10] == pytest.approx([i / 10 for i in range(10)])
    assert linear[55] == pytest.approx(0.5)
    assert cosine[55] == pytest.approx(0.5)
    assert linear[-1] == pytest.approx(1 / 90)
    assert set(constant[10:]) == {1.0}
    assert at("linear", 0.0)[0] == 1.0


@pytest.mark.parametrize("shape", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("steps", [None, 100])
def test_a_schedule_follows_the_time(shape, steps):
    """The share of the time where it is ahead of the share of the steps; the rates are those of a schedule by steps."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = make_scheduler(optimizer, steps or TIMED_STEPS, shape, 0.1)
    by_steps, clock = make_scheduler(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), 100, shape, 0.1), [0.0]
    end_with_time(schedule, steps, lambda: clock[0])
    for number in range(1, 101):
        clock[0] = min(1.0, number / 100 + 0.2 * (number == 50))
        optimizer.step()
        schedule.step()
        expected = by_steps.lr_lambdas[0](100 * clock[0])
        assert schedule.get_last_lr() == pytest.approx([expected]), number
    clock[0] = 0.3  # an earlier time: the steps are ahead
    schedule.step()
    assert schedule.get_last_lr() == pytest.approx([by_steps.lr_lambdas[0](101 if steps else 30)])


def test_another_kind_of_schedule_does_not_follow_the_time():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(InputError, match="a StepLR does not follow the time"):
        end_with_time(torch.optim.lr_scheduler.StepLR(optimizer, 3), 10, lambda: 0.5)


@pytest.mark.parametrize("wrong", [{"lr": 0}, {"layer_decay": 0}, {"layer_decay": 1.1}])
def test_wrong_settings_name_their_key(encoder, wrong):
    given = dict(lr=1e-3, weight_decay=0.0, layer_decay=1.0, betas=(0.9, 0.999), eps=1e-8)
    with pytest.raises(InputError, match=f"^{next(iter(wrong))}="):
        adamw(encoder, **(given | wrong))
