"""``(optimizer, steps) -> LRScheduler``."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from tercet.error import InputError

_NAMES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


def schedule(optimizer: Optimizer, steps: int, shape: str, warmup: float) -> LRScheduler:
    """``linear`` or ``cosine`` down to 0 over ``steps``, or ``constant``, after a linear rise over ``warmup`` of them."""
    if shape not in _NAMES:
        raise InputError(f"schedule.shape={shape}: choose one of {', '.join(_NAMES)}.")
    if not 0 <= warmup < 1:
        raise InputError(f"schedule.warmup={warmup}: the share of all steps, from 0 to below 1.")
    made: LRScheduler = get_scheduler(_NAMES[shape], optimizer, round(warmup * steps), steps)
    return made
