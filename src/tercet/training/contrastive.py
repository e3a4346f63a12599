"""The training step that the contrastive objectives share, and its cross-batch memory."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_

from tercet.distributed import contrast, gather_rows, reduce_loss
from tercet.distributed.sharding import reshard, shard
from tercet.errors import require
from tercet.losses import InfoNCE
from tercet.messages import print_status
from tercet.models import CachedEncoder, Encoder
from tercet.models.engine.deterministic_dropout import with_dropout_seeds
from tercet.models.folder import KEY, encoder_spec
from tercet.training import optimizers
from tercet.training.lightning_compat import EvaluationHooks, FSDP2Strategy, begin_next_epoch, elapsed_share, logs_now
from tercet.training.masked_lm import MaskedLM
from tercet.training.optimizers import MakeOptimizer, MakeScheduler, adamw, make_scheduler
from tercet.types import Batch, Embeddings, LossOutput, TokenBatch, send

UNIFORMITY_ROWS = 1024  # they have a million pairs


class Memory(nn.Module):
    """Cross-batch memory (Wang et al. 2020, arXiv:1912.06798): detached keys of the last ``size`` examples; 0 turns it off.

    The same in every process, and usable with any loss. It is filled from the first step on and used after ``warmup`` steps,
    when embeddings change slowly. Which rows to keep is decided on the CPU, so that the host need not wait for a device.

    >>> Memory(size=4096).size
    4096
    """

    def __init__(self, size: int = 0, warmup: int = 1000) -> None:
        super().__init__()
        require(size >= 0 and warmup >= 0, f"`size`={size}, `warmup`={warmup}: 0 or more.")
        self.size, self.warmup, self.steps = size, warmup, 0
        self.stored: Embeddings | None = None
        self.stored_id = torch.empty(0, dtype=torch.long)  # the stored examples, on the CPU
        # The last keys until it is known whether they are finite, and what was stored before them.
        self.pending: tuple[Tensor, torch.cuda.Event | None, tuple[Any, ...]] | None = None

    def extend_and_push(self, keys: Embeddings, own_id: Tensor) -> Embeddings:
        """``keys`` and, after the warm-up, the stored keys of other examples; then store the newest ``size`` examples.

        ``own_id (n,)`` is ``example_id`` of this process's rows, on the CPU.
        """
        self.settle()
        ids = gather_rows(own_id.cpu())
        extended, new, new_id = keys, replace(keys, z=keys.z.detach()), ids
        if self.stored is not None:
            others = Embeddings(**{name: x.to(keys.z.device) for name, x in vars(self.stored).items()})
            dropped = torch.isin(self.stored_id, ids)
            kept = dropped.long().argsort(stable=True)[: len(dropped) - sum(dropped.tolist())]
            if len(kept) < len(others):
                others = others.select(send([kept], keys.z.device)[0])
            extended = keys if self.steps < self.warmup else _concat(keys, others)
            new, new_id = _concat(others, new), torch.cat([self.stored_id[kept], ids])
        finite = torch.isfinite(keys.z).all()
        on_cpu, arrived = finite.to("cpu", non_blocking=True), torch.cuda.Event() if finite.is_cuda else None
        if arrived:
            arrived.record()
        self.pending = on_cpu, arrived, (self.stored, self.stored_id, self.steps)
        first = max(0, len(new) - self.size)
        self.stored, self.stored_id, self.steps = new.select(slice(first, None)), new_id[first:], self.steps + 1
        return extended

    def settle(self) -> None:
        """Take back the last keys if they were not finite. A device is read a step later, when it is past them."""
        if self.pending is None:
            return
        finite, arrived, before = self.pending
        if arrived:
            arrived.synchronize()
        if not finite.tolist():
            self.stored, self.stored_id, self.steps = before
        self.pending = None

    def get_extra_state(self) -> dict[str, Any]:
        """The stored keys, for checkpoints."""
        self.settle()
        stored = {} if self.stored is None else vars(self.stored)
        return {"steps": self.steps, **{name: x.cpu() for name, x in stored.items()}}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what ``get_extra_state`` gave."""
        stored = {name: x for name, x in state.items() if name != "steps"}
        self.steps, self.stored = state["steps"], Embeddings(**stored) if stored else None
        self.stored_id = stored["example_id"].cpu() if stored else torch.empty(0, dtype=torch.long)
        self.pending = None


def _concat(first: Embeddings, second: Embeddings) -> Embeddings:
    rows = {name: [x, getattr(second, name).to(x.dtype)] for name, x in vars(first).items()}
    return Embeddings(**{name: torch.cat(both, 1 if name == "z" else -1) for name, both in rows.items()})


@dataclass(frozen=True)
class BatchPlan:
    """Makes a batch ready for a step: its ``views``, the seeds of dropout, and where the tokens are.

    Batches whose rows have at most ``longest_seeded`` tokens get seeds.
    """

    views: Callable[[Batch, int], Batch]
    seed: int
    longest_seeded: float

    def __call__(self, batch: Batch, step: int) -> Batch:
        """The batch for the optimizer's step ``step``."""
        batch = replace(self.views(batch, step), is_prepared=True)
        if isinstance(batch.inputs, TokenBatch) and batch.inputs.index.longest <= self.longest_seeded:
            return with_dropout_seeds(batch, self.seed, step)
        return batch


def _unchanged(batch: Batch, step: int) -> Batch:
    return batch


class ObjectiveHooks(EvaluationHooks):
    """What every objective declares, and hooks of a LightningModule with an ``encoder``, ``optimizer`` and ``scheduler``.

    ``columns`` is the fewest and the most columns of the data; ``positives`` is what makes two rows of a batch positives of
    each other: the same "example" or "label", a neighboring "position", or "none"; ``makes_views`` says whether the objective
    makes the two views of a text itself.
    """

    columns: ClassVar[tuple[int, int]] = (1, 3)
    positives: ClassVar[str] = "example"
    makes_views: ClassVar[bool] = False
    cached_encoder: CachedEncoder  # set by callbacks that evaluate
    # The views that the objective trains on, of a batch and the number of the step.
    views: Callable[[Batch, int], Batch] = staticmethod(_unchanged)
    prepared: Batch  # of this step, with its views
    stage = "test"
    seed = 0
    gradient_norm: Tensor | None = None  # of this step, before clipping

    @classmethod
    def needs(cls, num_columns: int) -> frozenset[str]:
        """What data of ``num_columns`` columns must have ("label") and their batches hold ("same_label", "adjacent")."""
        return frozenset()

    def on_fit_start(self: Any) -> None:
        """Say how rows run on the device, and use one seed in all processes: the first one's of ``seed_everything``."""
        if plan := self.encoder.describe_execution():
            print_status(plan)
        self.seed = int(self.trainer.strategy.broadcast(torch.initial_seed() % (1 << 62)))

    def configure_optimizers(self: Any) -> OptimizerLRScheduler:
        """The optimizer and its schedule, which advances every step and is logged as ``train/lr``."""
        streaming = getattr(getattr(self.trainer, "datamodule", None), "streaming", False)
        # The estimate opens the loader, which is too early for a stream: FSDP2 restores where it was after this.
        steps = self.trainer.max_steps if streaming else self.trainer.estimated_stepping_batches
        optimizer, elapsed = self.optimizer(self), elapsed_share(self.trainer)
        total = int(steps) if 1 <= steps < float("inf") else None  # a stream has no length
        advice = "Set `trainer.max_steps`, or `trainer.max_time` to train for a given time."
        require(total or elapsed, f"The number of steps is not known, which the schedule needs. {advice}")
        schedule = self.scheduler(optimizer, total or optimizers.TIMED_STEPS)
        if elapsed is not None:
            optimizers.end_with_time(schedule, total, elapsed)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": "train/lr"}}

    def configure_model(self: Any) -> None:
        """Shard the encoder where the strategy is FSDP2."""
        if isinstance(self.trainer.strategy, FSDP2Strategy):
            shard(self.encoder, self.trainer.strategy.device_mesh["data_parallel"])

    def on_train_start(self: Any) -> None:
        """Where a run is resumed: after a whole epoch the next one, with the rates of the schedule, which may be longer."""
        begin_next_epoch(self.trainer)
        for config in self.trainer.lr_scheduler_configs:
            optimizers.follow_schedule(config.scheduler)

    @property
    def views_on_device(self) -> bool:
        """Whether the views have to be made on the device; others are made on the CPU, while the device works."""
        return False

    def plan(self: Any) -> BatchPlan:
        """What makes a batch ready for its step."""
        return BatchPlan(self.views, self.seed, self.encoder.longest_seeded())

    def plan_of_workers(self: Any) -> BatchPlan | None:
        """The plan, if the loader's workers can use it: they have no device, and not the objective, which a method needs."""
        return None if self.views_on_device or inspect.ismethod(self.views) else self.plan()

    def prepare(self: Any, batch: Batch) -> Batch:
        """The batch, ready for this step: here and now, unless a worker has made it so."""
        ready: Batch = batch if batch.is_prepared else self.plan()(batch, self.global_step)
        self.prepared = ready
        return ready

    def log_training(self: Any, logged: dict[str, Tensor], batch: Batch) -> None:
        """Log the step's metrics as ``train/<name>``, in steps whose values are written."""
        if logs_now(self._trainer):
            self.log_dict({f"train/{name}": x for name, x in logged.items()}, batch_size=len(batch))

    def on_after_backward(self: Any) -> None:
        """Free gathered weights; gradients are sharded by now."""
        if isinstance(self.trainer.strategy, FSDP2Strategy):
            reshard(self.encoder)

    def configure_gradient_clipping(
        self: Any, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip as Lightning does; by ``gradient_norm``, where ``SkipNonFinite`` has computed it for this step."""
        norm, self.gradient_norm = self.gradient_norm, None
        if norm is None or not gradient_clip_val or gradient_clip_algorithm == "value":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        else:
            trained = (p for group in optimizer.param_groups for p in group["params"])
            clip_grads_with_norm_(trained, gradient_clip_val, norm)

    def on_save_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
        """Save what the encoder is built from: a checkpoint can be moved and opened alone."""
        checkpoint[KEY] = encoder_spec(self.encoder)


class Contrastive(ObjectiveHooks, pl.LightningModule):
    """Embed the batch, gather the keys, sum the loss over this process's anchors, divide by the global normalizer.

    A subclass declares ``columns``, ``positives``, ``makes_views`` and ``needs``. It may override ``views``, a function that
    selects or makes the views, and ``embed``. ``optimizer`` takes the module, ``scheduler`` the optimizer and the number of
    steps.
    """

    default_loss: ClassVar[Callable[[], nn.Module]] = InfoNCE

    def __init__(
        self, encoder: Encoder, loss: nn.Module | None = None, optimizer: MakeOptimizer = adamw,
        scheduler: MakeScheduler = make_scheduler, mlm: MaskedLM | None = None, memory: Memory | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.encoder = encoder
        self.loss = type(self).default_loss() if loss is None else loss
        self.optimizer, self.scheduler = optimizer, scheduler
        mlm = mlm or MaskedLM()
        self.mlm_weight = mlm.weight
        self.mlm = mlm.build(encoder)
        self.memory = memory if memory and memory.size else None
        require(
            self.memory is None or getattr(self.loss, "key_exchange", None) != "ring",
            f"`memory.size`={memory and memory.size} with `loss.key_exchange`=ring: a memory holds all keys, a process in a "
            "ring those of one process at a time. Use only one of the two.",
        )
        self.num_unreadable = 0  # rows that could not be read so far

    def embed(self, batch: Batch) -> Embeddings:
        """All views in one forward pass: ``z (V, N, D)``."""
        z = self.encoder(batch.inputs).unflatten(0, (len(batch.views), len(batch)))
        return Embeddings(z, batch.example_id, batch.label, batch.position, batch.content_hash)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """A value whose gradient, averaged over the processes, is that of the loss of the global batch."""
        batch, logs = self.prepare(batch), logs_now(self._trainer)
        anchors = self.embed(batch)
        extend = None if self.memory is None else partial(self.memory.extend_and_push, own_id=batch.readable_id)
        keys, output = contrast(self.loss, anchors, extend)
        stats = {**output.stats, **_alignment(anchors)} if logs else {}
        value, logged = reduce_loss(LossOutput(output.loss_sum, output.normalizer, stats))
        logged |= _geometry(anchors.z[0], keys.z[0]) if logs else {}
        if self.mlm is not None:
            masked, entropy = reduce_loss(self.mlm(batch.inputs))
            value = value + self.mlm_weight * masked
            logged["mlm_loss"] = entropy["loss"]
        self.num_unreadable += batch.num_unreadable
        if self.num_unreadable and logs:
            logged["unreadable"] = value.new_full((), self.num_unreadable)
        self.log_training(logged, batch)
        return value


@torch.no_grad()
def _alignment(anchors: Embeddings) -> dict[str, Tensor]:
    """The sum over rows of ||x - y||^2 of the first two views on the unit sphere (Wang and Isola 2020, eq. 1)."""
    if len(anchors.z) < 2:
        return {}
    x, y = F.normalize(anchors.z[:2].detach().float(), dim=-1)
    total = (x - y).square().sum()
    return {"alignment": torch.stack([total, total.new_full((), len(x))])}


@torch.no_grad()
def _geometry(z: Tensor, keys: Tensor) -> dict[str, Tensor]:
    """Measures of rows on the unit sphere that show a collapse.

    ``uniformity``: log mean over distinct pairs of this process's first rows of exp(-2 ||x - y||^2) (Wang and Isola, eq. 2).
    ``spread``: the mean ||x - y||^2 over distinct pairs of keys, 0 after a collapse and 2 for evenly distributed directions.
    ``mean_norm``: the length of the mean key, 1 after a collapse and 0 for evenly distributed directions.
    """
    x, y = (F.normalize(rows.detach().float(), dim=-1) for rows in (z[:UNIFORMITY_ROWS], keys))
    with torch.autocast(x.device.type, enabled=False):  # half precision tells no cosines near 1 apart
        cosines = x @ x.T
    pairs = (4 * (cosines - 1)).fill_diagonal_(-torch.inf).exp().sum().div(len(x) * (len(x) - 1)).log()
    square = y.mean(0).square().sum()
    spread = 2 * len(y) / max(1, len(y) - 1) * (1 - square)
    return {"uniformity": pairs if len(x) > 1 else x.new_zeros(()), "spread": spread, "mean_norm": square.sqrt()}
