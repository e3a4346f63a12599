"""Compiled layers: the same embeddings and gradients, packed, compiled once for rows of any length."""

from functools import partialmethod

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from tercet.app.components import build
from tests.conftest import composed, tiny

BATCHES = (["a man plays", "two dogs"], ["a man is eating food in the kitchen", "a", "a dog runs"], ["a girl"] * 9)


def encoder(compile, *overrides):
    torch.manual_seed(0)
    overrides = (f"model.compile={str(compile).lower()}", "model.backbone.config.num_hidden_layers=3", *overrides)
    return build(composed(*tiny(), *overrides).model)


@pytest.fixture
def without_code_generation(monkeypatch):
    """What torch.compile captures, run as it is: generating machine code takes a minute and needs a C++ compiler."""
    torch.compiler.reset()
    counters.clear()
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    yield
    torch.compiler.reset()


def embeddings_and_gradients(model, texts):
    rows = model.prepare(texts)
    torch.manual_seed(1)
    out = model(rows)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return out.detach(), gradients


def check_equal(overrides, training):
    models = [encoder(compiled, *overrides).train(training) for compiled in (False, True)]
    assert {model.execution.layout for model in models} == {"packed"}
    kinds = []
    for texts in BATCHES:
        (out, slopes), (compiled_out, compiled_slopes) = (embeddings_and_gradients(model, texts) for model in models)
        torch.testing.assert_close(compiled_out, out, rtol=1e-5, atol=1e-5)
        assert slopes.keys() == compiled_slopes.keys()
        for name, slope in slopes.items():
            torch.testing.assert_close(compiled_slopes[name], slope, rtol=1e-4, atol=1e-5, msg=name)
        kinds.append(counters["stats"]["unique_graphs"])
    return kinds


slow = pytest.mark.slow
CHUNKS = ["model.execution.recompute=true", "model.execution.chunk_tokens=8"]


@pytest.mark.parametrize(
    ("training", "overrides"),
    [
        (True, ["model.pooling=cls"]),  # the last layer computes first tokens only
        pytest.param(True, ["model.execution.dropout=deterministic"], marks=slow),
        pytest.param(True, CHUNKS, marks=slow),
        pytest.param(False, ["model.pooling=first_last"], marks=slow),
    ],
)
def test_compiled_layers_stay_packed_and_give_the_same(without_code_generation, training, overrides, capsys):
    graphs = check_equal(overrides, training)
    assert graphs[0] == graphs[-1] > 0, "compiled again for rows of other lengths"
    assert capsys.readouterr().err.count("Compiling BertModel took") == 1


@slow
def test_layers_share_what_is_compiled(without_code_generation):
    check_equal([], training=True)
    three = counters["stats"]["unique_graphs"]
    torch.compiler.reset()
    counters.clear()
    check_equal(["model.backbone.config.num_hidden_layers=6"], training=True)
    assert counters["stats"]["unique_graphs"] == three


@slow
def test_generated_code_gives_the_same():
    check_equal([], training=True)
