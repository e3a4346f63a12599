"""Optimizers and learning-rate schedulers."""

import re
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import SGD, Adagrad, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import get_scheduler

from tercet.errors import InputError, check_choice, require
from tercet.training.lightning_compat import let_scaler_unscale
from tercet.types import runs_on_cpu

MakeOptimizer = Callable[[nn.Module], Optimizer]  # of a module
TIMED_STEPS = 10_000  # of the schedule of a run whose length is a time
MakeScheduler = Callable[[Optimizer, int], LRScheduler]  # of an optimizer and the number of steps


def parameter_groups(module: nn.Module, lr: float, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, object]]:
    """Trained parameters by learning rate and weight decay, which biases, norms and scalars do not have.

    The learning rate falls by ``layer_decay`` per layer below the top; the embeddings count as the layer below the first, heads
    and everything else outside the layers keep the full rate (Sun et al. 2019, arXiv:1905.05583, section 5.3.4).
    """
    require(lr > 0, f"`lr`={lr}: a number above 0 is needed.")
    require(weight_decay >= 0, f"`weight_decay`={weight_decay}: 0 or more.")
    require(0 < layer_decay <= 1, f"`layer_decay`={layer_decay}: above 0 and at most 1 (1: the same rate in every layer).")
    trained = [(p, _depth(name)) for name, p in module.named_parameters() if p.requires_grad]
    top = max((depth for _, depth in trained if depth is not None), default=0)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for p, depth in trained:
        rate = lr if depth is None else lr * layer_decay ** (top - depth)
        groups.setdefault((rate, weight_decay if p.ndim > 1 else 0.0), []).append(p)
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]


def _depth(name: str) -> int | None:
    """The number of the backbone's layer, -1 for its embeddings, None outside of both."""
    layer = re.search(r"\.layers?\.(\d+)\.", name)
    inside = int(layer[1]) if layer else -1 if "embed" in name else None
    return inside if "backbone." in name else None


def adagrad(module: nn.Module, lr: float = 0.05, weight_decay: float = 0.0) -> Adagrad:
    """AdaGrad (Duchi et al. 2011) at 0.05, as FaceNet trains (Schroff et al. 2015, section 3)."""
    return Adagrad(parameter_groups(module, lr, weight_decay), lr=lr)


def sgd(module: nn.Module, lr: float = 0.05, momentum: float = 0.9, weight_decay: float = 0.0) -> SGD:
    """Stochastic gradient descent with momentum; fused on a GPU, where it can then skip a step by itself."""
    require(momentum >= 0, f"`momentum`={momentum}: 0 or more.")
    fused = not any(runs_on_cpu(p.device) or isinstance(p, DTensor) for p in module.parameters())
    optimizer = SGD(parameter_groups(module, lr, weight_decay), lr=lr, momentum=momentum, fused=fused or None)
    if fused and momentum:  # so that the first step can be skipped as well
        optimizer.state.update({p: {"momentum_buffer": torch.zeros_like(p)} for p in module.parameters() if p.requires_grad})
    let_scaler_unscale(optimizer)
    return optimizer


def adamw(
    module: nn.Module, lr: float = 3e-5, weight_decay: float = 0.0, layer_decay: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
) -> AdamW:  # fmt: skip
    """AdamW over ``parameter_groups``, fused where torch can: on a CPU that takes an eighth of the time."""
    require(len(betas) == 2 and all(0 <= beta < 1 for beta in betas), f"`betas`={list(betas)}: two numbers from 0 to below 1.")
    require(eps >= 0, f"`eps`={eps}: 0 or more.")
    groups = parameter_groups(module, lr, weight_decay, layer_decay)
    fused = all(p.device.type in ("cpu", "cuda") for p in module.parameters())
    optimizer = AdamW(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=fused or None)
    let_scaler_unscale(optimizer)
    return optimizer


def make_scheduler(optimizer: Optimizer, steps: int, shape: str = "linear", warmup: float = 0.0) -> LRScheduler:
    """A learning rate that rises linearly over the share ``warmup`` of all ``steps`` and then follows ``shape``.

    ``linear`` and ``cosine`` fall to 0 at the last step; ``constant`` stays.
    """
    check_choice("shape", shape, ("linear", "cosine", "constant"))
    require(0 <= warmup < 1, f"`warmup`={warmup}: the share of all steps, from 0 to below 1.")
    name = "constant_with_warmup" if shape == "constant" else shape
    return cast(LRScheduler, get_scheduler(name, optimizer, round(warmup * steps), steps))


def end_with_time(scheduler: LRScheduler, steps: int | None, elapsed: Callable[[], float]) -> None:
    """Let a schedule end with the time of a run: its position is the share of the time that has ``elapsed``, 0 to 1.

    Where ``steps`` are known, too, it is the larger of that share and the share of steps, because what is first ends the run.
    Without them the schedule was made for ``TIMED_STEPS``.
    """
    if not isinstance(scheduler, LambdaLR):
        raise InputError(f"`scheduler`: a {type(scheduler).__name__} does not follow the time. Set `trainer.max_steps`.")
    total = TIMED_STEPS if steps is None else steps

    def at_position(factor: Callable[[Any], float]) -> Callable[[int], float]:
        return lambda step: factor(max(0 if steps is None else step, elapsed() * total))

    scheduler.lr_lambdas = [at_position(factor) for factor in scheduler.lr_lambdas]


def follow_schedule(scheduler: LRScheduler) -> None:
    """Set the learning rates that a schedule has at its present step.

    Those in a checkpoint are of the schedule that it was saved with, 0 at its last step; a resumed run may have more steps.
    """
    if isinstance(scheduler, LambdaLR):  # in others a rate follows from the one before
        for group, lr, factor in zip(scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
            group["lr"] = lr * factor(scheduler.last_epoch)
