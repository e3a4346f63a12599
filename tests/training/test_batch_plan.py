"""Batches that the loader's workers make ready for their step are those that the first process would make."""

import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import pytorch_lightning as pl
import torch

from tercet.app.components import build
from tercet.data.samplers import RandomBatchSampler, ResumableSampler
from tercet.training import SimCSESup
from tercet.types import Batch
from tests.conftest import TEXTS, Ids, choices, composed, tiny

QUIET = {"precision": "32-true", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False,
         "enable_model_summary": False}  # fmt: skip
TRIPLES = ["data=table", "data.columns=[a,b,c]"]
CASES = {
    "unsupervised": ["objective=simcse_unsup", *TRIPLES],
    "accumulated": ["objective=simcse_sup", *TRIPLES, "trainer.accumulate_grad_batches=3"],
    "views": ["objective=simcse_unsup", *TRIPLES, "view=mixed", "trainer.accumulate_grad_batches=2"],
    "torch's dropout": ["objective=simcse_unsup", *TRIPLES, "view=span_cutoff", "model.execution.dropout=torch"],
    "neighbors": ["objective=quick_thoughts", "data=table", "data.columns=[a]", "sampler=random"],
    "masked LM": ["objective=mlm", *TRIPLES],
}
VIEWS = [view for view in choices("view") if not view.startswith("mlm")]


class _Seen(pl.Callback):
    """What the batches of a run hold when the step begins."""

    def __init__(self):
        self.batches = []

    def on_train_batch_start(self, trainer, module, batch, number):
        self.batches.append((trainer.global_step, batch))


def trained(overrides, folder, workers, **options):
    """The batches of two epochs, their losses, and the module."""
    rows = [TEXTS[i % len(TEXTS)] + " again" * (i % 3) for i in range(56)]
    pq.write_table(pa.table({name: [*rows[i:], *rows[:i]] for i, name in enumerate("abc")}), folder / "rows.parquet")
    settings = ["data.held_out=0", "data.batch_size=8", "trainer.max_steps=-1", "trainer.max_epochs=2", "logger=none"]
    cfg = composed(*tiny(f"data.path={folder / 'rows.parquet'}", f"data.workers={workers}", *settings, *overrides))
    torch.manual_seed(0)
    module, data, seen = build(cfg.objective), build(cfg.data.module), _Seen()
    trainer = build(cfg.trainer, default_root_dir=folder, callbacks=[seen], **QUIET, **options)
    trainer.fit(module, datamodule=data)
    return seen.batches, torch.cat([p.detach().flatten() for p in module.parameters()]), module


def only_ready(module, batch):
    """``prepare``, which has nothing to do."""
    assert batch.is_prepared
    module.prepared = batch
    return batch


def tensors(batch):
    rows = batch.inputs
    return [batch.example_id, batch.content_hash, rows.lengths, *rows.tensors(), *(view.ids for view in batch.views)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_workers_make_the_batches_of_the_first_process(name, tmp_path, monkeypatch):
    here, weights, module = trained(CASES[name], tmp_path, 0)
    monkeypatch.setattr(type(module), "prepare", only_ready)
    there, same, _ = trained(CASES[name], tmp_path, 2)
    assert len(here) == len(there) == 14
    for (step, ours), (other, theirs) in zip(here, there, strict=True):
        assert step == other and ours.is_prepared and theirs.is_prepared
        assert set(ours.inputs.state.set_fields()) == set(theirs.inputs.state.set_fields())
        for a, b in zip(tensors(ours), tensors(theirs), strict=True):
            assert torch.equal(a, b)
    assert torch.equal(weights, same)


class _Method(SimCSESup):
    """Its views need the objective."""

    def views(self, batch, step):
        return batch.select_columns(*([0, 1] if step == self.global_step else [0, 0]))


@pytest.mark.filterwarnings("ignore")
def test_the_first_process_makes_the_views_of_a_method(tmp_path):
    overrides = [*CASES["accumulated"], f"objective._target_={__name__}._Method"]
    (here, weights, module), (there, same, _) = (trained(overrides, tmp_path, workers) for workers in (0, 2))
    assert module.plan_of_workers() is None
    assert all(len(batch.views) == 2 and not torch.equal(*(view.ids for view in batch.views)) for _, batch in here + there)
    assert torch.equal(weights, same)


@pytest.mark.parametrize("view", VIEWS)
def test_a_plan_can_be_sent_to_a_worker(view, tmp_path):
    """Where workers do not begin as a copy of the first process, as on macOS."""
    torch.manual_seed(0)
    (tmp_path / "list.tsv").write_text("dog\thound\n")
    listed = [f"view.second.0.path={tmp_path / 'list.tsv'}"] if view == "synonyms" else []
    module = build(composed(*tiny("objective=simcse_unsup", *TRIPLES, "data.path=x", f"view={view}", *listed)).objective)
    ids = torch.arange(len(TEXTS))
    batch = Batch((module.encoder.prepare(TEXTS),), ids, ids, ids, ids[None])
    want, got = (plan(batch, 7) for plan in (module.plan_of_workers(), pickle.loads(pickle.dumps(module.plan_of_workers()))))
    for other in (got, pickle.loads(pickle.dumps(want))):
        assert all(map(torch.equal, tensors(want), tensors(other)))


@pytest.mark.parametrize(("accumulated", "done"), [(1, 0), (1, 5), (2, 0), (2, 4), (3, 0), (3, 3), (3, 6)])
def test_each_batch_has_the_number_of_its_step(accumulated, done):
    """The optimizer steps after ``accumulated`` batches, and after the last one of an epoch."""
    sampler, steps, step = RandomBatchSampler(Ids(torch.full((56,), -1)), 8, 1), [], 20
    for number in range(7):
        steps.append(step)
        step += (number + 1) % accumulated == 0 or number == 6
    rest = list(ResumableSampler(sampler, lambda: (done, steps[done], accumulated)))
    assert [indices.step for indices in rest] == steps[done:]
    assert [indices.rows for indices in rest] == [indices.rows for indices in sampler][done:]
