"""Passes that are replayed as CUDA graphs equal those that are not; on a CPU: what a graph does not have changes nothing."""

import pickle
import sys
from collections import Counter
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import pytorch_lightning as pl
import torch

from tercet.app.components import build
from tercet.errors import InputError
from tercet.models import Head, TextEncoder
from tercet.models.engine import replay
from tercet.models.engine import triton_kernels as kernels
from tercet.models.engine.deterministic_dropout import with_dropout_seeds
from tercet.models.engine.packing import AttentionSettings, Packing, attend_short
from tercet.training.callbacks import LastCheckpoint, RNGState
from tercet.types import Batch, RowIndex, TokenBatch, TokenState, rounded_tokens
from tests.conftest import TEXTS, composed, tiny
from tests.laws.device_operations import do_as_on_a_gpu
from tests.laws.distributed_runs import config, data
from tests.laws.recorded_graphs import RecordedGraph, replay_on_a_cpu

POOLINGS = ["cls", "mean", "max", "last"]


def made(pooling="cls", *more):
    torch.manual_seed(0)
    return build(composed(*tiny(f"model.pooling={pooling}", *more)).model)


def seeded(encoder, texts, step=0):
    ids = torch.arange(len(texts))
    rows = encoder.prepare(texts)
    return with_dropout_seeds(Batch((rows, rows), ids, ids, ids, torch.stack([ids, ids])), 1, step).inputs


def row_by_row(q, k, v, starts, lengths, longest, scale, p, seed, attend, number, window, first_only):
    """Attention as a loop; what belongs to no row gets zeros."""
    out = torch.zeros_like(q)
    for row, (start, n) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        own, mine = slice(start, start + n), slice(row, row + 1) if first_only else slice(start, start + n)
        scores = torch.einsum("ihd,jhd->hij", q[mine], k[own]) * (scale or q.shape[-1] ** -0.5)
        out[mine] = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v[own])
    return out


@pytest.mark.parametrize("pooling", POOLINGS)
def test_tokens_of_no_row_change_neither_values_nor_gradients(pooling, monkeypatch):
    """A graph has more tokens than its rows, with ids of an earlier batch, and rows that are longer than the longest."""
    encoder = made(pooling).eval()
    rows = encoder.prepare(TEXTS)
    want = encoder(rows)
    weight = torch.linspace(-1, 1, want.numel()).view_as(want)
    weights = [p for p in encoder.parameters() if p.requires_grad]
    slopes = torch.autograd.grad((want * weight).sum(), weights, allow_unused=True)
    do_as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(kernels, "available", lambda device, *_: True)
    monkeypatch.setattr(kernels, "short_attention", row_by_row)
    tokens = rounded_tokens(len(rows.ids) + 1)
    more = TokenBatch(rows.ids.repeat(4)[:tokens], rows.lengths, TokenState())
    more.index = replace(RowIndex.of(rows.lengths, RowIndex.layout(rows.lengths, tokens), tokens), longest=32)
    got = encoder(more)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for a, b in zip(torch.autograd.grad((got * weight).sum(), weights, allow_unused=True), slopes, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_models_that_mix_types_under_autocast_are_cast_as_for_torchs_attention(monkeypatch):
    """EuroBERT's rotary positions leave queries and keys in float32."""
    seen = []
    monkeypatch.setattr(kernels, "short_attention", lambda q, k, v, *_: seen.append((q.dtype, k.dtype, v.dtype)) or q)
    q, k = torch.randn(2, 1, 2, 5, 16).unbind()
    rows = Packing(TokenBatch(torch.zeros(5), torch.tensor([3, 2])).index)
    with torch.autocast("cpu", torch.bfloat16):
        attend_short(q, k, q.bfloat16(), rows, AttentionSettings())
    attend_short(q, k, q, rows, AttentionSettings())
    assert seen == [(torch.bfloat16,) * 3, (torch.float32,) * 3]


def test_a_copy_begins_without_graphs():
    encoder = made()
    encoder.replay.graphs["a size"] = object()
    for copied in (deepcopy(encoder), pickle.loads(pickle.dumps(encoder.replay))):
        assert (copied.replay if hasattr(copied, "replay") else copied).graphs == {}


@pytest.mark.parametrize(("longest", "drawn"), [(128, True), (129, False)])
def test_dropout_of_long_rows_is_torchs_where_seeds_would_cost_more(longest, drawn, monkeypatch):
    encoder = made()
    monkeypatch.setattr(TextEncoder, "device", property(lambda self: torch.device("cuda")))
    monkeypatch.setattr(kernels, "available", lambda device, longest=1, d=1: longest <= 128)
    assert (longest <= encoder.longest_seeded()) == drawn
    said = encoder.describe_execution()
    assert ("torch's in batches with rows of more than 128" in said) == (encoder.max_length > 128)


def passes(encoder, rows, graphs, half=None):
    encoder.execution = replace(encoder.execution, graphs=graphs)
    encoder.zero_grad(set_to_none=True)
    with torch.autocast(rows.ids.device.type, half, enabled=half is not None):
        z = encoder(rows)
    weight = torch.linspace(-1, 1, z.numel(), device=z.device).view_as(z)
    (z.float() * weight).sum().backward()
    return z.detach(), torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None])


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """A GPU, or a CPU where operations are recorded as CUDA graphs record them."""
    if request.param == "cpu":
        replay_on_a_cpu(monkeypatch)
    return request.param


@pytest.mark.parametrize("half", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_replayed_pass_is_the_pass(pooling, half, device):
    encoder = made(pooling).to(device)
    for step, texts in enumerate((TEXTS, TEXTS[::-1], TEXTS[:7], TEXTS)):
        rows = seeded(encoder, texts, step).to(device)
        z, grad = passes(encoder, rows, False, half)
        for _ in range(2):  # captured or replayed, and replayed
            got, slope = passes(encoder, rows, True, half)
            torch.testing.assert_close(got, z, rtol=1e-2 if half else 1e-5, atol=1e-2 if half else 1e-5)
            assert (slope - grad).norm() <= (1e-2 if half else 1e-5) * grad.norm()
    assert 1 <= len(encoder.replay.graphs) <= 3
    assert len({graph.stages[0].flat_grad.data_ptr() for graph in encoder.replay.graphs.values()}) == 1, "each keeps a gradient"


def frozen_layer(encoder):
    encoder.layer_stack()[1].requires_grad_(False)


def tied(encoder):
    """A weight of the first layer is one of the third, too: of two stages."""
    first, _, third, *_ = encoder.layer_stack()
    third.intermediate.dense.weight = first.intermediate.dense.weight


@pytest.mark.parametrize("change", [None, frozen_layer, tied], ids=lambda change: change and change.__name__)
@pytest.mark.parametrize("pooling", ["cls", "mean", "first_last", "static_last"])
def test_a_backward_pass_in_stages_is_the_backward_pass(pooling, change, device, monkeypatch):
    """Some poolings read hidden states of first layers, whose gradient then goes around later ones."""
    monkeypatch.setattr(replay, "world_size", lambda: 2)
    encoder = made(pooling, "model.backbone.config.num_hidden_layers=5").to(device)
    if change:
        change(encoder)
    for step in range(2):
        rows = seeded(encoder, TEXTS, step).to(device)
        z, grad = passes(encoder, rows, False)
        for _ in range(2):
            got, slope = passes(encoder, rows, True)
            torch.testing.assert_close(got, z, rtol=1e-5, atol=1e-5)
            assert (slope - grad).norm() <= 1e-5 * grad.norm()
    (graph,) = encoder.replay.graphs.values()
    assert [bool(stage.names) for stage in graph.stages] == [True, True, change is not frozen_layer, True]
    assert not any(layer._forward_pre_hooks for layer in encoder.layer_stack()[:-1])


def test_gradients_of_replayed_passes_add_up(device):
    encoder, total = made().to(device), 0
    rows = [seeded(encoder, TEXTS, step).to(device) for step in range(2)]
    total = sum(passes(encoder, part, False)[1] for part in rows)
    encoder.zero_grad(set_to_none=True)
    encoder.execution = replace(encoder.execution, graphs=True)
    outputs = []
    for part in rows:
        outputs.append(z := encoder(part))
        (z * torch.linspace(-1, 1, z.numel(), device=device).view_as(z)).sum().backward()
    got = torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None])
    assert (got - total).norm() <= 1e-5 * total.norm()
    assert not torch.equal(*outputs), "the second replay overwrote what the first returned"


def of_chunks(encoder, *rows, graphs=True):
    """The embeddings and gradients of recomputed chunks, of several passes before one backward pass."""
    encoder.execution = replace(encoder.execution, chunk_tokens=48, recompute=True, graphs=graphs)
    encoder.zero_grad(set_to_none=True)
    counts = Counter()
    hooks = [p.register_post_accumulate_grad_hook(lambda p: counts.update([p])) for p in encoder.parameters()]
    outputs = [encoder(part) for part in rows]
    sum((z * torch.linspace(-1, 1, z.numel(), device=z.device).view_as(z)).sum() for z in outputs).backward()
    assert set(counts.values()) == {1}, "a gradient is reduced more than once"
    for hook in hooks:
        hook.remove()
    grads = [p.grad.flatten() for p in encoder.parameters() if p.grad is not None]
    return torch.cat([z.detach() for z in outputs]), torch.cat(grads)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_replayed_chunks_are_the_recomputed_ones(pooling, processes, device, monkeypatch):
    """Chunks of one shape share a graph, whose memory the next one overwrites; so do two passes before a backward pass."""
    monkeypatch.setattr(replay, "world_size", lambda: processes)
    encoder = made(pooling, "model.backbone.dropout=0.2").to(device)
    rows = [seeded(encoder, texts, step).to(device) for step, texts in enumerate((TEXTS, [*TEXTS[3:9], "one"]))]
    z, grad = of_chunks(encoder, *rows, graphs=False)
    chunks = sum(len(encoder.execution.chunks(part.lengths)) for part in rows)
    for _ in range(2):
        before = RecordedGraph.replays
        got, slope = of_chunks(encoder, *rows)
        torch.testing.assert_close(got, z, rtol=1e-5, atol=1e-5)
        assert (slope - grad).norm() <= 1e-5 * grad.norm()
        (stages,) = {len(graph.stages) for graph in encoder.replay.graphs.values()}
        assert device == "cuda" or RecordedGraph.replays - before == chunks * (2 + stages)
    assert 1 < len(encoder.replay.graphs) < chunks


def test_chunks_without_seeds_are_not_replayed(device):
    """Their dropout would not draw the same numbers again."""
    encoder = made("cls", "model.execution.dropout=torch").to(device)
    of_chunks(encoder, encoder.prepare(TEXTS).to(device))
    assert not encoder.replay.graphs
    of_chunks(encoder, seeded(encoder, TEXTS).to(device))
    assert encoder.replay.graphs


def test_a_pass_that_is_not_recomputed_waits_for_those_that_are(device):
    encoder = made().to(device)
    rows = seeded(encoder, TEXTS).to(device)
    want, grad = passes(encoder, rows, False)
    plain = encoder.execution
    encoder.execution = replace(plain, chunk_tokens=48, recompute=True, graphs=True)
    first = encoder(rows)
    pending, replays = encoder.replay.pending, RecordedGraph.replays
    encoder.execution = replace(plain, graphs=True)
    assert torch.allclose(encoder(rows), want, atol=1e-5)
    assert encoder.replay.pending is pending and RecordedGraph.replays == replays
    encoder.zero_grad(set_to_none=True)
    (first * torch.linspace(-1, 1, first.numel(), device=device).view_as(first)).sum().backward()
    slope = torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None])
    assert (slope - grad).norm() <= 1e-5 * grad.norm() and encoder.replay.pending() is None


def test_a_chunk_whose_capture_fails_ends_the_pass_where_another_is_to_be_replayed(monkeypatch):
    replay_on_a_cpu(monkeypatch)
    encoder = made()
    rows, capture, captures = seeded(encoder, TEXTS), torch.cuda.graph, []

    def fail(graph, **options):
        captures.append(graph)
        if len(captures) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return capture(graph, **options)

    monkeypatch.setattr(torch.cuda, "graph", fail)
    with pytest.raises(InputError, match="recompute"):
        of_chunks(encoder, rows)
    assert not encoder.replay.graphs


def test_replayed_dropout_of_torch_differs_each_time_and_follows_its_seed(device):
    encoder = made("cls", "model.execution.dropout=torch").to(device)
    rows = encoder.prepare(TEXTS).to(device)
    first, second = encoder(rows).detach(), encoder(rows).detach()
    assert encoder.replay.graphs and not torch.equal(first, second)
    drawn = []
    for _ in range(2):
        torch.manual_seed(5)
        drawn.append(encoder(rows).detach())
    assert torch.equal(*drawn)


def test_a_second_pass_before_the_backward_pass_of_the_first_runs_without_a_graph(device):
    encoder = made().to(device)
    rows, others = (seeded(encoder, texts).to(device) for texts in (TEXTS, TEXTS[::-1]))
    passes(encoder, rows, True)
    first = encoder(rows)
    before = first.detach().clone()
    encoder(others).sum().backward()
    assert torch.equal(first.detach(), before)
    first.sum().backward()


def test_frozen_weights_and_a_second_gradient(device):
    encoder = made().to(device)
    rows = seeded(encoder, TEXTS).to(device)
    z = encoder(rows)
    z.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        z.sum().backward()
    encoder.requires_grad_(False)
    assert not encoder(rows).requires_grad


def test_moved_weights_are_captured_again(device):
    encoder = made().to(device)
    rows = seeded(encoder, TEXTS).to(device)
    passes(encoder, rows, True)
    for p in encoder.parameters():
        p.data = p.data.clone() * 1.5
    z, grad = passes(encoder, rows, False)
    got, slope = passes(encoder, rows, True)
    torch.testing.assert_close(got, z, rtol=1e-5, atol=1e-5)
    assert (slope - grad).norm() <= 1e-5 * grad.norm()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dropout", ["torch", "deterministic"])
def test_a_resumed_run_draws_what_it_would_have_drawn(dropout, device, tmp_path):
    """It captures its graphs in other steps than a run that was not stopped."""
    settings = ("model.backbone.dropout=0.1", f"model.execution.dropout={dropout}", "scheduler=constant", "scheduler.warmup=0")
    cfg = config("simcse_unsup", *settings)

    def run(folder, steps, checkpoint=None):
        pl.seed_everything(0, verbose=False)
        module = build(cfg.objective)
        trainer = pl.Trainer(
            accelerator="gpu" if device == "cuda" else "cpu", devices=1, max_steps=steps, max_epochs=-1, logger=False,
            enable_progress_bar=False, enable_model_summary=False,
            callbacks=[RNGState(), LastCheckpoint(str(tmp_path / folder), 2)],
        )  # fmt: skip
        trainer.fit(module, datamodule=data(cfg, tmp_path, 3), ckpt_path=checkpoint)
        assert module.encoder.replay.graphs
        return torch.cat([p.detach().flatten().cpu() for p in module.parameters()])

    whole, part = run("whole", 7), run("part", 2)
    assert not torch.equal(whole, part)
    assert torch.equal(run("part", 7, tmp_path / "part" / "last.ckpt"), whole)


def test_a_long_row_and_a_size_too_many_run_without_a_graph(device, monkeypatch):
    encoder = made().to(device)
    monkeypatch.setattr(replay, "MOST_GRAPHS", 2)
    long = "again " * (encoder.max_length - 2)
    assert len(encoder.prepare([long]).ids) > kernels.LONGEST, "the row is not long"
    texts = [TEXTS[:3], [*TEXTS[:2], long], TEXTS[:4], TEXTS[:5], TEXTS[:3]]
    for step, (some, graphs) in enumerate(zip(texts, (1, 1, 2, 2, 2), strict=True)):
        rows = seeded(encoder, some, step).to(device)
        (z, grad), (got, slope) = (passes(encoder, rows, graphs) for graphs in (False, True))
        torch.testing.assert_close(got, z, rtol=1e-5, atol=1e-5)
        assert (slope - grad).norm() <= 1e-5 * grad.norm()
        assert len(encoder.replay.graphs) == graphs


def test_a_pass_that_another_setting_changes_is_captured_again(device):
    encoder = made("cls", "model.backbone.dropout=0.5").to(device)
    rows = seeded(encoder, TEXTS).to(device)

    def no_dropout():
        for module in encoder.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0

    for change in (lambda: None, no_dropout, lambda: setattr(encoder, "pooling", "mean")):
        change()
        (z, grad), (got, slope) = (passes(encoder, rows, graphs) for graphs in (False, True))
        torch.testing.assert_close(got, z, rtol=1e-5, atol=1e-5)
        assert (slope - grad).norm() <= 1e-5 * grad.norm()


def test_graphs_of_one_module_share_a_stream_a_pool_and_a_gradient(monkeypatch):
    """A stream of the rows' device, and no other module's: torch frees what cuBLAS has for it with any graph of the stream."""
    replay_on_a_cpu(monkeypatch)
    places, devices = [], []

    def stream(device):
        devices.append(device)
        return SimpleNamespace(wait_stream=lambda other: None)

    def capture(graph, pool, stream, **_):
        places.append((pool, stream))
        return graph

    for name, value in {"Stream": stream, "graph": capture, "graph_pool_handle": object}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    encoder, other = made(), made()
    for texts in (TEXTS, TEXTS[:7], TEXTS[:3]):
        passes(encoder, seeded(encoder, texts), True)
    graphs = encoder.replay.graphs.values()
    assert len(graphs) == 3 and len({graph.stages[0].flat_grad.data_ptr() for graph in graphs}) == 1
    passes(other, seeded(other, TEXTS), True)
    encoder.head.requires_grad_(False)
    next(encoder.parameters()).requires_grad_(False)
    passes(encoder, seeded(encoder, TEXTS), True)
    assert len(places) == 10 and len({id(pool) for pool, _ in places}) == len({id(s) for _, s in places}) == 3
    assert set(devices) == {torch.device("cpu")} and len(devices) == 3


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), KeyboardInterrupt()])
def test_a_capture_that_fails_leaves_nothing_behind(error, monkeypatch):
    replay_on_a_cpu(monkeypatch)
    encoder, handled = made(), []
    rows = [seeded(encoder, texts) for texts in (TEXTS, TEXTS[:7])]
    plain = [passes(encoder, part, False) for part in rows]
    passes(encoder, rows[0], True)
    pool = encoder.pool
    monkeypatch.setattr(encoder, "pool", lambda *given: handled.append(sys.exc_info()[1]) or pool(*given))
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "graph", Mock(side_effect=error))
        with pytest.raises(KeyboardInterrupt) if isinstance(error, KeyboardInterrupt) else nullcontext():
            passes(encoder, rows[1], True)
    assert not encoder.replay.graphs and not any(handled), "an error that is handled keeps the memory of the capture"
    for part, (z, grad) in zip(rows, plain, strict=True):
        got, slope = passes(encoder, part, True)
        torch.testing.assert_close(got, z, rtol=1e-5, atol=1e-5)
        assert (slope - grad).norm() <= 1e-5 * grad.norm()
    assert len(encoder.replay.graphs) == (2 if isinstance(error, KeyboardInterrupt) else 0)


def test_weights_in_place_of_others_are_captured_and_trained(device):
    encoder = made().to(device)
    rows = seeded(encoder, TEXTS).to(device)

    def load():
        encoder.load_state_dict({name: x.clone() for name, x in encoder.state_dict().items()}, assign=True)
        encoder.requires_grad_()

    def another_head():
        encoder.head = Head("mlp", 3)
        encoder.head.build(encoder.hidden, 0.1)
        encoder.to(device)

    for change in (lambda: None, load, another_head):
        change()
        (z, grad), (got, slope) = (passes(encoder, rows, graphs) for graphs in (False, True))
        torch.testing.assert_close(got, z, rtol=1e-5, atol=1e-5)
        assert (slope - grad).norm() <= 1e-5 * grad.norm()
