"""Law 9 on whole steps: from the batch's arrival to the end of the optimizer's step nothing is asked of the device."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from datasets import concatenate_datasets
from hydra.utils import get_class
from torch.optim import adagrad
from transformers import BertConfig, BertModel

from tercet.app.components import build
from tercet.data.text_transform import TextTransform
from tercet.models.engine import replay
from tercet.models.engine import triton_kernels as kernels
from tercet.models.engine.chunking import Execution
from tercet.models.engine.deterministic_dropout import apply_dropout
from tercet.rng import derive_seed
from tercet.training.callbacks import RNGState
from tercet.training.datamodule import DataModule
from tercet.types import RowIndex, TokenBatch
from tests.conftest import TEXTS, choices, composed, tiny
from tests.laws.device_operations import DeviceOperations, do_as_on_a_gpu
from tests.laws.distributed_runs import Listed, config, tokenizer
from tests.laws.recorded_graphs import RecordedGraph, replay_on_a_cpu

STEPS = range(3, 6)  # neither the first nor one whose values are written
HOST = (
    (RowIndex, "of"),
    (RowIndex, "layout"),
    (TokenBatch, "select"),
    (Execution, "chunks"),
    (RNGState, "_record"),
    (adagrad, "_get_value"),
)  # work on its own tensors; AdaGrad counts its steps there
QUIET = {"precision": "32-true", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False,
         "enable_model_summary": False}  # fmt: skip
CALLBACKS = ("skip_non_finite", "throughput", "collapse", "rng_state", "graceful_stop")
TRIPLES = ["data=table", "data.columns=[a,b,c]"]
UNSUP, SUP = ["objective=simcse_unsup", *TRIPLES], ["objective=simcse_sup", *TRIPLES]
CASES = {
    "unsupervised": UNSUP,
    "torch's dropout": [*UNSUP, "model.execution.dropout=torch"],
    "mean pooling, both directions": [*SUP, "model.pooling=mean", "loss.direction=both", "loss.learn_temperature=true"],
    "head": [*UNSUP, "model.head.kind=mlp", "model.head.train_only=true"],
    "hard negatives": [*SUP, "loss.hard_negative_weight=1"],
    "clipped and accumulated": [*SUP, "trainer.gradient_clip_val=1", "trainer.accumulate_grad_batches=2"],
    "masked-LM auxiliary": [*UNSUP, "objective.mlm.weight=0.1"],
    "masked LM": ["objective=mlm", *TRIPLES],
    "whole words": ["objective=mlm", *TRIPLES, "objective.mlm.whole_words=true"],
    "memory": [*SUP, "objective.memory.size=16", "objective.memory.warmup=1"],
    "SGD": [*SUP, "optimizer=sgd", "trainer.gradient_clip_val=1"],
    "AdaGrad": [*SUP, "optimizer=adagrad", "trainer.gradient_clip_val=1"],
    "triplets of pairs": ["objective=facenet", "sampler=random", *TRIPLES],
    "chunks": [*SUP, "model.execution.chunk_tokens=64"],
    "recomputed chunks": [*SUP, "model.execution.chunk_tokens=64", "model.execution.recompute=true"],
    **{f"view {view}": [*UNSUP, f"view={view}"] for view in ("mixed", "crop", "deletion", "shuffle", "token_cutoff",
                                                             "feature_cutoff", "repetition", "span_cutoff", "masking")},
}  # fmt: skip


# Operations that the host starts outside of the graphs in a step; a loop around BERT-base starts nearly a thousand.
REPLAYED = {"unsupervised": 116, "hard negatives": 125, "masked-LM auxiliary": 178, "masked LM": 52}


class _Steps(pl.Callback):
    def __init__(self, operations):
        self.operations, self.count = operations, 0

    def on_train_batch_start(self, trainer, *_):
        self.operations.active = trainer.global_step in STEPS

    def on_train_batch_end(self, *_):
        self.count += self.operations.active
        self.operations.active = False


def steps(overrides, tmp_path, monkeypatch, callbacks=CALLBACKS, prepare=lambda *_: None):
    """The operations of ``STEPS`` of a run with the callbacks of ``train``; 24 batches of 8 rows."""
    rows = [TEXTS[i % len(TEXTS)] + " again" * (i % 3) for i in range(192)]
    shifted = {name: [*rows[i:], *rows[:i]] for i, name in enumerate("abc")}
    pq.write_table(pa.table(shifted), tmp_path / "rows.parquet")
    cfg = composed(*tiny(
        f"data.path={tmp_path / 'rows.parquet'}", "data.held_out=0", "data.batch_size=8", "trainer.max_steps=12",
        "trainer.max_epochs=-1", "logger=none", *overrides))  # fmt: skip
    return measured(cfg, build(cfg.data.module), tmp_path, monkeypatch, callbacks, prepare)


def measured(cfg, data, tmp_path, monkeypatch, callbacks=CALLBACKS, prepare=lambda *_: None):
    """The operations of ``STEPS`` of a run on those rows."""
    torch.manual_seed(0)
    objective = build(cfg.objective)
    do_as_on_a_gpu(monkeypatch)
    operations = DeviceOperations()
    operations.active = False
    prepare(monkeypatch, operations)
    for owner, name in HOST:
        operations.pause_in(monkeypatch, owner, name)
    counter = _Steps(operations)
    used = [counter, *(build(cfg.callback[name]) for name in callbacks)]
    trainer = build(cfg.trainer, default_root_dir=tmp_path, callbacks=used, **QUIET)
    with operations:
        trainer.fit(objective, datamodule=data)
    assert counter.count >= len(STEPS)
    return operations


class _Rows(Listed):
    """Twenty-four batches of the rows of ``Listed``."""

    def rows(self):
        return concatenate_datasets([super().rows()] * 16)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("objective", choices("objective"))
def test_a_step_of_every_objective_asks_nothing_of_the_device(objective, tmp_path, monkeypatch):
    cfg = config(objective)
    cfg.trainer.max_steps, cfg.trainer.max_epochs = 12, -1
    rows = _Rows(tuple("abc"[: get_class(cfg.objective._target_).columns[1]]), label=True)
    data = DataModule(rows, TextTransform(tokenizer(), 32, str(tmp_path)), build(cfg.sampler), 8, name="rows")
    measured(cfg, data, tmp_path, monkeypatch)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_a_step_asks_nothing_of_the_device(name, tmp_path, monkeypatch):
    steps(CASES[name], tmp_path, monkeypatch)


class _OneOperation(torch.autograd.Function):
    """``function`` of a tensor, of which each direction counts as one operation, as a kernel does."""

    @staticmethod
    def forward(ctx, x, operations, function):
        with operations.paused(), torch.enable_grad():
            ctx.x = x.detach().requires_grad_()
            ctx.out, ctx.operations = function(ctx.x), operations
        operations.counts["kernel"] += operations.active
        return ctx.out.detach()

    @staticmethod
    def backward(ctx, grad):
        ctx.operations.counts["kernel"] += ctx.operations.active
        with ctx.operations.paused():
            return *torch.autograd.grad(ctx.out, ctx.x, grad), None, None


def as_kernels(monkeypatch, operations):
    """Let attention and dropout be one operation each, as Triton's kernels are; attention is that of a row's own value."""
    one = lambda x, function: _OneOperation.apply(x, operations, function)  # noqa: E731
    attention = lambda q, k, v, *_, **__: one(v, lambda v: q + k[: len(q)] + v[: len(q)])  # noqa: E731
    dropout = lambda x, p, seed, number: one(x, lambda x: apply_dropout(x, p, derive_seed(seed, number)))  # noqa: E731
    monkeypatch.setattr(kernels, "available", lambda device, *_: True)
    monkeypatch.setattr(kernels, "short_attention", attention)
    monkeypatch.setattr(kernels, "seeded_dropout", dropout)


def test_a_step_stays_within_the_budget_of_a_bare_loop(tmp_path, monkeypatch):
    """At most 1.15 times the operations of a padded loop around the same BERT; each of our kernels is one."""
    callbacks = ("throughput",)  # the loop looks at no gradient before it clips it
    ours = steps([*UNSUP, "trainer.gradient_clip_val=1"], tmp_path, monkeypatch, callbacks=callbacks, prepare=as_kernels)
    assert ours.total / len(STEPS) <= 1.15 * bare_loop().total, ours.counts


@pytest.mark.parametrize("name", REPLAYED)
def test_a_replayed_step_is_started_by_few_calls(name, tmp_path, monkeypatch):
    """What the host starts outside of the graphs: the loss, clipping and the optimizer."""

    def replayed(monkeypatch, operations):
        replay_on_a_cpu(monkeypatch)
        for owner, function in ((RecordedGraph, "replay"), (replay, "longest_row")):
            operations.pause_in(monkeypatch, owner, function)

    before = RecordedGraph.replays
    found = steps([*CASES[name], "trainer.gradient_clip_val=1"], tmp_path, monkeypatch, prepare=replayed)
    assert RecordedGraph.replays - before >= 2 * len(STEPS)
    assert found.total / len(STEPS) <= REPLAYED[name], found.counts


def bare_loop():
    """The operations of one step of a loop around transformers' BERT, as tiny as ours: two views, InfoNCE, clipping, AdamW."""
    config = composed(*tiny()).model.backbone.config
    model = BertModel(BertConfig(**{k: v for k, v in config.items() if k != "model_type"}), add_pooling_layer=False).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
    ids, mask = torch.randint(10, 100, (16, 9)), (torch.arange(9) < torch.arange(16)[:, None] % 5 + 5).long()
    target = torch.arange(8)
    for _ in range(2):  # the second step makes no state
        with DeviceOperations(refuse=False) as operations:
            z = F.normalize(model(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0], dim=-1)
            F.cross_entropy(z[:8] @ z[8:].T / 0.05, target).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return operations
