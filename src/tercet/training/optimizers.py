"""Optimizers and learning-rate schedulers."""

import re
from collections.abc import Callable

import pytorch_lightning as pl
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim import SGD, Adagrad, AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from tercet.errors import InputError
from tercet.training.lightning_compat import let_scaler_unscale

MakeOptimizer = Callable[[nn.Module], Optimizer]  # of a module
MakeScheduler = Callable[[Optimizer, int], LRScheduler]  # of an optimizer and the number of steps


def parameter_groups(module: nn.Module, lr: float, weight_decay: float, layer_decay: float) -> list[dict[str, object]]:
    """Trained parameters by learning rate and weight decay.

    Biases, norms and scalars have no weight decay. The learning rate falls by ``layer_decay`` per layer below the top; the
    embeddings count as the layer below the first, heads and everything else outside the layers keep the full rate
    (Sun et al. 2019, arXiv:1905.05583, section 5.3.4).

    >>> layer = nn.Linear(2, 3)
    >>> [(len(g["params"]), g["weight_decay"]) for g in parameter_groups(layer, lr=0.1, weight_decay=0.01, layer_decay=1.0)]
    [(1, 0.01), (1, 0.0)]
    """
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    depths = {name: _depth(name) for name, _ in named}
    top = max((d for d in depths.values() if d is not None), default=0)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, p in named:
        depth = depths[name]
        rate = lr if depth is None else lr * layer_decay ** (top - depth)
        groups.setdefault((rate, weight_decay if p.ndim > 1 else 0.0), []).append(p)
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]


def _depth(name: str) -> int | None:
    """The number of the backbone's layer, -1 for its embeddings, None outside of both."""
    if "backbone." not in name:
        return None
    if match := re.search(r"\.layers?\.(\d+)\.", name):
        return int(match[1])
    return -1 if "embed" in name else None


def adagrad(module: nn.Module, lr: float = 0.05, weight_decay: float = 0.0) -> Adagrad:
    """AdaGrad (Duchi et al. 2011) at 0.05, as FaceNet trains (Schroff et al. 2015, section 3)."""
    return Adagrad(_undecayed_groups(module, lr, weight_decay), lr=lr)


def sgd(module: nn.Module, lr: float = 0.05, momentum: float = 0.9, weight_decay: float = 0.0) -> SGD:
    """Stochastic gradient descent with momentum."""
    return SGD(_undecayed_groups(module, lr, weight_decay), lr=lr, momentum=momentum)


def _undecayed_groups(module: nn.Module, lr: float, weight_decay: float) -> list[dict[str, object]]:
    _check_rate(lr)
    return parameter_groups(module, lr, weight_decay, layer_decay=1.0)


def _check_rate(lr: float) -> None:
    if not lr > 0:
        raise InputError(f"`lr`={lr}: a number above 0 is needed.")


def adamw(
    module: nn.Module, lr: float = 3e-5, weight_decay: float = 0.0, layer_decay: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
) -> AdamW:  # fmt: skip
    """AdamW over ``parameter_groups``, fused where torch can: on a CPU that takes an eighth of the time.

    >>> optimizer = adamw(nn.Linear(2, 3), lr=1e-3)
    >>> optimizer.param_groups[0]["lr"]
    0.001
    """
    _check_rate(lr)
    if not 0 < layer_decay <= 1:
        raise InputError(f"`layer_decay`={layer_decay}: above 0 and at most 1 (1: the same rate in every layer).")
    fused = all(p.device.type in ("cpu", "cuda") for p in module.parameters())
    groups = parameter_groups(module, lr, weight_decay, layer_decay)
    optimizer = AdamW(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=True if fused else None)
    let_scaler_unscale(optimizer)
    return optimizer


SHAPES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}  # our names and those of transformers


def make_scheduler(optimizer: Optimizer, steps: int, shape: str = "linear", warmup: float = 0.0) -> LRScheduler:
    """A learning rate that rises linearly over the share ``warmup`` of all ``steps`` and then follows ``shape``.

    ``linear`` and ``cosine`` fall to 0 at the last step; ``constant`` stays.
    """
    if shape not in SHAPES:
        raise InputError(f"`shape`={shape}: choose one of {', '.join(SHAPES)}.")
    if not 0 <= warmup < 1:
        raise InputError(f"`warmup`={warmup}: the share of all steps, from 0 to below 1.")
    scheduler: LRScheduler = get_scheduler(SHAPES[shape], optimizer, round(warmup * steps), steps)
    return scheduler


def optimizer_with_schedule(
    module: pl.LightningModule, optimizer: MakeOptimizer, scheduler: MakeScheduler
) -> OptimizerLRScheduler:
    """What Lightning's ``configure_optimizers`` returns; the schedule advances every step and is logged as ``train/lr``."""
    made = optimizer(module)
    steps = module.trainer.estimated_stepping_batches
    if not 1 <= steps < float("inf"):  # a stream has no length, and a time limit is no number of steps
        raise InputError("The number of steps is not known, which the schedule needs. Set `trainer.max_steps`.")
    schedule = scheduler(made, int(steps))
    return {"optimizer": made, "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": "train/lr"}}
