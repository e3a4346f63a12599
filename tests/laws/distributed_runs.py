"""Run objectives for a step in one process or in two, and return what they learned. Imported by the processes too."""

import io
import multiprocessing
import tempfile
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import datasets
import pytest
import pytorch_lightning as pl
import torch
import yaml
from hydra.utils import get_class
from omegaconf import OmegaConf
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.nn.parallel import DistributedDataParallel

from tercet.app.components import build
from tercet.app.launch import set_precision
from tercet.data import TextTransform
from tercet.losses.triplet_mining import MININGS
from tercet.models import load_tokenizer
from tercet.training.callbacks import SkipNonFinite
from tercet.training.datamodule import DataModule
from tercet.training.lightning_compat import FSDP2
from tests.conftest import NEEDED, TEXTS, TOKENIZER, choices, composed, restored_signals, tiny
from tests.laws.recorded_graphs import RecordedGraph, replay_on_a_cpu

OBJECTIVES = choices("objective")
SETTINGS = {
    "plain": [],
    "chunked": ["model.execution.chunk_tokens=24", "model.execution.recompute=true"],
    "with masked LM": ["objective.mlm.weight=0.1"],
    "with cut tokens": ["view=token_cutoff"],
    "with a view each": ["view=mixed"],
    "with words deleted": ["view=deletion"],
    "with dropout": ["model.backbone.dropout=0.1", "model.execution.dropout=deterministic"],
    "with dropout in chunks": [
        "model.backbone.dropout=0.1",
        "model.execution.dropout=deterministic",
        "model.execution.chunk_tokens=24",
        "model.execution.recompute=true",
    ],
    "accumulated": ["trainer.accumulate_grad_batches=2"],
    "in half precision": ["trainer.precision=bf16-mixed"],
    "in a ring": ["loss.key_exchange=ring", "loss.learn_temperature=true", "loss.label_smoothing=0.1"],
    "in a ring, both ways": ["loss.key_exchange=ring", "loss.direction=both"],
    "in shares": ["trainer.strategy=fsdp2"],
    "in shares, in chunks": [
        "trainer.strategy=fsdp2",
        "model.backbone.dropout=0.1",
        "model.execution.dropout=deterministic",
        "model.execution.chunk_tokens=24",
        "model.execution.recompute=true",
    ],
    "in shares, in chunks, saved": ["trainer.strategy=fsdp2", "model.execution.chunk_tokens=24"],
    "in shares, accumulated": ["trainer.strategy=fsdp2", "trainer.accumulate_grad_batches=2"],
    "in shares, with hard labels": ["trainer.strategy=fsdp2", "callback=hard_labels", "callback.hard_labels.labels=1"],
    "with memory": ["objective.memory.size=9", "objective.memory.warmup=1"],
}


@cache
def defaults(objective):
    """The configuration of an objective; composing is what takes long in a small case."""
    return composed(f"objective={objective}")


@cache
def tokenizer():
    return load_tokenizer(TOKENIZER)


def has(objective, overrides):
    """Whether an objective's configuration has the keys; masked language modeling is not trained in shards."""
    if "callback=hard_labels" in overrides:
        return "PK" in defaults(objective).sampler._target_
    if "trainer.strategy=fsdp2" in overrides:
        return objective != "mlm"
    cfg = defaults(objective)
    keys = [override.split("=")[0].replace("view", "objective.view") for override in overrides]
    return all(OmegaConf.select(cfg, key) is not None for key in keys if key.startswith(("objective", "loss.")))


CASES = [(o, s) for o in OBJECTIVES for s in SETTINGS if has(o, SETTINGS[s])]
CASES += [("facenet", f"loss.mining={mining}") for mining in MININGS if mining != "semihard"]
CASES += [("facenet", "loss.divide_by=sum")]
REPLAYED = [
    case for case in CASES if case[1] in ("plain", "with masked LM", "with dropout", "accumulated", "in half precision")
]


@dataclass(frozen=True)
class Listed:
    """A source in memory."""

    columns: tuple[str, ...]
    label: bool = False
    twice: bool = True

    def rows(self):
        """Twelve rows: each column a rotation of the texts, one text ``twice``; or no two of them equal."""
        texts = [*TEXTS[:-1], TEXTS[0] if self.twice else TEXTS[-1]]
        table = {name: texts[i:] + texts[:i] for i, name in enumerate(self.columns)}
        if not self.twice:
            table = {name: [f"{text} {name}" for text in column] for name, column in table.items()}
        ids = {"label": [0, 0, 1, 1, 2, -1] * 2, "position": list(range(12))} if self.label else {}
        return datasets.Dataset.from_dict({**table, **ids})

    def fingerprint(self):
        """The columns say it all."""
        return f"listed{self.label}{self.twice}" + "-".join(self.columns)


def config(objective, *overrides):
    """torch's own dropout is off: its draws differ between processes.

    Batches of whole windows have no uneven size: their sampler has tests of its own.
    """
    sampler = ["sampler=random"] if "Window" in defaults(objective).sampler._target_ else []
    needed = [*sampler, *NEEDED.get(objective, ())]
    groups = [override for override in overrides if "." not in override.split("=")[0]]
    cfg = composed(*tiny(f"objective={objective}", "model.backbone.dropout=0", *needed, *groups))
    for key, value in (override.split("=") for override in overrides if override not in groups):
        OmegaConf.update(cfg, key, yaml.safe_load(value))  # as Hydra does, after it has composed the groups, which takes long
    return cfg


def data(cfg, folder, batch_size):
    kind = get_class(cfg.objective._target_)
    # Which of two equally far negatives is mined is up to rounding: no two are where rows are told apart by distance.
    source = Listed(tuple("abc"[: kind.columns[1]]), label=True, twice=kind.positives != "label")
    return DataModule(
        source, TextTransform(tokenizer(), 32, str(folder)), build(cfg.sampler), batch_size, name="listed", shuffle_buffer=10
    )


class Counting(pl.Callback):
    """Counts the numbers that DDP reduces in a step."""

    def __init__(self):
        self.reduced = 0

    def on_train_start(self, trainer, pl_module):
        def hook(state, bucket):
            self.reduced += bucket.buffer().numel()
            return default_hooks.allreduce_hook(None, bucket)

        if isinstance(trainer.model, DistributedDataParallel):
            trainer.model.register_comm_hook(None, hook)


def configs(cases=tuple(CASES)):
    """The configuration of each case; composed once for all processes, because that takes as long as training does."""
    return {(objective, name): config(objective, *SETTINGS.get(name, [name])) for objective, name in cases}


def step(cfg, folder, world, batch_size, steps=2):
    """The weights after ``steps`` of clipped SGD, how often each was reduced per step, and how far one has moved at most."""
    pl.seed_everything(0, verbose=False)
    module = build(cfg.objective)
    module.optimizer = lambda m: torch.optim.SGD(m.parameters(), lr=0.1)
    hard_labels = build(cfg.callback.hard_labels)
    counting, start = Counting(), {n: p.detach().clone() for n, p in module.named_parameters()}
    shares = cfg.trainer.strategy == FSDP2
    strategy = "auto" if world == 1 else FSDP2 if shares else "ddp"
    set_precision(cfg)
    trainer = pl.Trainer(
        precision=cfg.trainer.precision, accumulate_grad_batches=cfg.trainer.accumulate_grad_batches,
        accelerator="cpu", devices=world, strategy=strategy, max_steps=steps, logger=False,
        gradient_clip_val=0.5, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, callbacks=[counting, SkipNonFinite(), *([hard_labels] if hard_labels else [])],
    )  # fmt: skip
    trainer.fit(module, datamodule=data(cfg, folder, batch_size))
    size = sum(p.numel() for p in module.parameters() if p.requires_grad)
    weights = {n: p.full_tensor() if shares and world > 1 else p for n, p in module.named_parameters()}
    reduced = None if shares else counting.reduced / size / steps  # shares are reduced layer by layer
    weights = {n: p.detach().clone() for n, p in weights.items()}
    return weights, reduced, max(float((w - start[n]).abs().max()) for n, w in weights.items())


def everything(folder, world, batch_size, configs):
    """A step of each of ``configs`` in this process."""
    torch.set_num_threads(1)
    return {case: step(cfg, folder, world, batch_size) for case, cfg in configs.items()}


def replayed(folder, world, batch_size, configs):
    """The weights after steps of each of ``configs`` with CUDA graphs, recorded on the CPU, and the number of replays."""
    torch.set_num_threads(1)
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        replay_on_a_cpu(patch)
        for case, cfg in configs.items():
            before = RecordedGraph.replays
            found[case] = step(cfg, folder, world, batch_size)[0], RecordedGraph.replays - before
    return found


def replays_before_reductions(overrides):
    """How many graphs DDP has seen replayed in a step when it begins to reduce each bucket of gradients."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    encoder = build(composed(*tiny(*overrides)).model)
    wrapped, seen = DistributedDataParallel(encoder, bucket_cap_mb=0.01), []

    def hook(state, bucket):
        seen.append(RecordedGraph.replays)
        return default_hooks.allreduce_hook(None, bucket)

    wrapped.register_comm_hook(None, hook)
    with pytest.MonkeyPatch.context() as patch:
        replay_on_a_cpu(patch)
        for _ in range(2):  # buckets are in the order of the first step's gradients from the second step on
            before = RecordedGraph.replays
            seen.clear()
            wrapped(encoder.prepare(TEXTS)).square().sum().backward()
    return [replays - before for replays in seen], RecordedGraph.replays - before


def in_processes(world, function, *arguments):
    """The results of ``function`` in ``world`` gloo processes, forked from one that has imported everything once.

    They come back as bytes: a tensor would be a shared file each. Where a process fails, the error says what all have written.
    One that a signal has ended is tried once more, with a warning: one has aborted in CI, and in 50 repetitions none.
    """
    try:
        return _in_processes(world, function, *arguments)
    except _EndedBySignalError as error:
        warnings.warn(f"A second try, because a process was ended by a signal: {error}", stacklevel=2)
        return _in_processes(world, function, *arguments)


class _EndedBySignalError(RuntimeError):
    """A process has ended by a signal."""


def _in_processes(world, function, *arguments):
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    with tempfile.TemporaryDirectory() as folder, restored_signals():
        plan = LaunchConfig(
            1, 1, world, run_id="laws", rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0,
            start_method="forkserver", logs_specs=DefaultLogsSpecs(folder, redirects=Std.ERR),
        )  # fmt: skip
        try:
            results = elastic_launch(plan, _saved)(function, *arguments)
        except ChildFailedError as error:
            written = {p.parent.name: p.read_text(errors="replace") for p in sorted(Path(folder).rglob("stderr.log"))}
            ends = [f"process {rank}: {text.split('Extension modules:')[0][-3000:]}" for rank, text in written.items()]
            kind = _EndedBySignalError if error.get_first_failure()[1].exitcode < 0 else RuntimeError
            raise kind("\n".join([str(error), *ends])) from error
    return {rank: torch.load(io.BytesIO(result), weights_only=False) for rank, result in results.items()}


def _saved(function, *arguments):
    buffer = io.BytesIO()
    torch.save(function(*arguments), buffer)
    return buffer.getvalue()
