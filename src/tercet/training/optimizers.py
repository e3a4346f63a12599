"""Optimizers and learning-rate schedulers."""

import re

from torch import nn
from torch.optim import SGD, Adagrad, AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from tercet.errors import InputError


def parameter_groups(module: nn.Module, lr: float, weight_decay: float, layer_decay: float) -> list[dict[str, object]]:
    """No weight decay on biases, norms and scalars; the learning rate falls by ``layer_decay`` per layer below the top.

    The embeddings count as the layer below the first; heads and what lies outside the layers keep the full rate
    (Sun et al. 2019, arXiv:1905.05583, section 5.3.4).
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
    """The number of a backbone's layer, -1 for its embeddings, None outside."""
    if "backbone." not in name:
        return None
    if match := re.search(r"\.layers?\.(\d+)\.", name):
        return int(match[1])
    return -1 if "embed" in name else None


def adagrad(module: nn.Module, lr: float, weight_decay: float) -> Adagrad:
    """AdaGrad, as FaceNet trains."""
    return Adagrad(_plain(module, lr, weight_decay), lr=lr)


def sgd(module: nn.Module, lr: float, momentum: float, weight_decay: float) -> SGD:
    """Stochastic gradient descent."""
    return SGD(_plain(module, lr, weight_decay), lr=lr, momentum=momentum)


def _plain(module: nn.Module, lr: float, weight_decay: float) -> list[dict[str, object]]:
    _check(lr)
    return parameter_groups(module, lr, weight_decay, layer_decay=1.0)


def _check(lr: float) -> None:
    if not lr > 0:
        raise InputError(f"optimizer.lr={lr}: a number above 0 is needed.")


def adamw(
    module: nn.Module, lr: float, weight_decay: float, layer_decay: float, betas: tuple[float, float], eps: float
) -> AdamW:
    """AdamW over ``parameter_groups``; fused where torch can (on a CPU it takes an eighth of the time)."""
    _check(lr)
    if not 0 < layer_decay <= 1:
        raise InputError(f"optimizer.layer_decay={layer_decay}: above 0 and at most 1 (1: the same rate in every layer).")
    fused = all(p.device.type in ("cpu", "cuda") for p in module.parameters())
    groups = parameter_groups(module, lr, weight_decay, layer_decay)
    optimizer = AdamW(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=True if fused else None)
    # It could undo a loss scale itself, for which Lightning refuses to clip in mixed precision. This way the scaler does.
    optimizer._step_supports_amp_scaling = False
    return optimizer


_NAMES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


def make_scheduler(optimizer: Optimizer, steps: int, shape: str, warmup: float) -> LRScheduler:
    """``linear`` or ``cosine`` down to 0 over ``steps``, or ``constant``, after a linear rise over ``warmup`` of them."""
    if shape not in _NAMES:
        raise InputError(f"scheduler.shape={shape}: choose one of {', '.join(_NAMES)}.")
    if not 0 <= warmup < 1:
        raise InputError(f"scheduler.warmup={warmup}: the share of all steps, from 0 to below 1.")
    made: LRScheduler = get_scheduler(_NAMES[shape], optimizer, round(warmup * steps), steps)
    return made
