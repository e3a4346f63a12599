"""Laws 4 and 7: two gloo processes, and four, learn what one does, with one reduction of each gradient a step."""

import pytest
import torch

from tests.laws import distributed_runs
from tests.laws.distributed_runs import everything

BATCH = 7  # uneven: three rows in one process, four in the other
CLOSE = {"rtol": 1e-4, "atol": 2e-6}
HALF = {"rtol": 1e-2, "atol": 2e-3}  # bfloat16 has 8 bits; a step of these moves weights by 5e-2


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)], ids="{} processes".format)
def results(tmp_path_factory, request):
    cache = str(tmp_path_factory.mktemp("cache"))
    configs = distributed_runs.configs()
    alone = everything(cache, 1, BATCH, configs)
    return alone, distributed_runs.in_processes(request.param, everything, cache, request.param, BATCH, configs)[0]


@pytest.mark.parametrize("case", distributed_runs.CASES, ids=str)
def test_several_processes_learn_what_one_does(results, case):
    alone, together = (result[case][0] for result in results)
    assert alone.keys() == together.keys()
    for name, weight in alone.items():
        close = HALF if case[1] == "in half precision" else CLOSE
        torch.testing.assert_close(together[name], weight, **close, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(scope="module", params=[1, 2], ids="{} processes".format)
def with_graphs(tmp_path_factory, request):
    arguments = (
        str(tmp_path_factory.mktemp("cache")),
        request.param,
        BATCH,
        distributed_runs.configs(tuple(distributed_runs.REPLAYED)),
    )
    if request.param == 1:
        return distributed_runs.replayed(*arguments)
    return distributed_runs.in_processes(request.param, distributed_runs.replayed, *arguments)[0]


@pytest.mark.parametrize("case", distributed_runs.REPLAYED, ids=str)
def test_passes_that_are_replayed_as_cuda_graphs_learn_the_same(results, with_graphs, case):
    (weights, replays), expected = with_graphs[case], results[0][case][0]
    assert replays > 0
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        close = HALF if case[1] == "in half precision" else CLOSE
        torch.testing.assert_close(weights[name], weight, **close, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", distributed_runs.CASES, ids=str)
def test_training_moves_the_weights(results, case):
    assert results[0][case][2] > 1e-3


@pytest.mark.parametrize("case", distributed_runs.CASES, ids=str)
def test_each_gradient_is_reduced_once_a_step(results, case):
    assert results[1][case][1] in (1, None)


def test_gradients_are_reduced_while_the_backward_pass_is_replayed():
    overrides = ("model.backbone.config.num_hidden_layers=4", "model.backbone.dropout=0")
    for seen, replays in distributed_runs.in_processes(2, distributed_runs.replays_before_reductions, overrides).values():
        assert replays == 5, "one forward pass and a backward pass in four stages"
        assert seen == sorted(seen) and set(seen) == {2, 3, 4, 5}, "each stage is followed by reductions"
