"""``(hidden states, mask) -> (N, H)``: how a row of tokens becomes one vector."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Pooling = Callable[[Any, Tensor], Tensor]


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    weight = mask[..., None].to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1)


def cls(output: Any, mask: Tensor) -> Tensor:
    """The first token of the last layer."""
    first: Tensor = output.last_hidden_state[:, 0]
    return first


def cls_pooler(output: Any, mask: Tensor) -> Tensor:
    """The first token through the model's own pooler (BERT: linear and tanh)."""
    pooled: Tensor = output.pooler_output
    return pooled


def mean(output: Any, mask: Tensor) -> Tensor:
    """The mean over the row's tokens, special tokens included as everywhere in the field."""
    return _mean(output.last_hidden_state, mask)


def total(output: Any, mask: Tensor) -> Tensor:
    """The sum over the row's tokens: Quick-Thoughts' bag of words."""
    hidden: Tensor = output.last_hidden_state
    return (hidden * mask[..., None].to(hidden.dtype)).sum(1)


def final(output: Any, mask: Tensor) -> Tensor:
    """The final state of a recurrent backbone, both directions side by side."""
    state: Tensor = output.pooler_output
    return state


def maximum(output: Any, mask: Tensor) -> Tensor:
    """The largest value over the row's tokens, dimension by dimension."""
    hidden: Tensor = output.last_hidden_state
    return hidden.masked_fill(~mask[..., None].bool(), torch.finfo(hidden.dtype).min).amax(1)


def last(output: Any, mask: Tensor) -> Tensor:
    """The last token of the row: for causal models."""
    hidden: Tensor = output.last_hidden_state
    return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]


def first_last(output: Any, mask: Tensor) -> Tensor:
    """The mean of the first transformer layer and the last (SimCSE's ``avg_first_last`` since 2024)."""
    return _mean((output.hidden_states[1] + output.hidden_states[-1]) / 2, mask)


def static_last(output: Any, mask: Tensor) -> Tensor:
    """The mean of the embedding layer and the last: what gave the 56.70 of SimCSE's Table 5."""
    return _mean((output.hidden_states[0] + output.hidden_states[-1]) / 2, mask)


def top_two(output: Any, mask: Tensor) -> Tensor:
    """The mean of the two last layers."""
    return _mean((output.hidden_states[-2] + output.hidden_states[-1]) / 2, mask)


POOLINGS: dict[str, Pooling] = {
    "cls": cls,
    "cls_pooler": cls_pooler,
    "mean": mean,
    "sum": total,
    "max": maximum,
    "final": final,
    "last": last,
    "first_last": first_last,
    "static_last": static_last,
    "top_two": top_two,
}
OF_WORDS = frozenset({"final", "sum"})  # poolings of encoders of words alone
WORD_POOLINGS = ("final", "mean", "sum", "max")  # what an encoder of words can have
NEEDS_FIRST = frozenset({"cls", "cls_pooler"})  # poolings that read first tokens alone
NEEDS_ALL_LAYERS = frozenset({"first_last", "static_last", "top_two"})
