"""Pooling and projection heads."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tercet.errors import InputError

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


KINDS = ("none", "linear", "mlp", "two_linear", "two_mlp")


class Head(nn.Module):
    """``none``, ``linear`` (H to D) or ``mlp`` (H to D, then tanh: SimCSE's).

    ``two_linear`` and ``two_mlp`` are two of them on one trunk, side by side: Quick-Thoughts' f and g, of D each.

    With ``train_only`` it is skipped outside training (SimCSE's ``mlp_only_train``: unsupervised models are better
    without, arXiv:2104.08821 Table 6). ``dim`` null means D = H.
    """

    def __init__(self, kind: str, dim: int | None, train_only: bool) -> None:
        super().__init__()
        if kind not in KINDS:
            raise InputError(f"model.head.kind={kind}: choose one of {', '.join(KINDS)}.")
        if kind == "none" and (dim is not None or train_only):
            raise InputError(
                f"model.head.kind=none has neither dim ({dim}) nor train_only ({train_only}). "
                "Use model.head.kind=linear or mlp, or model.head.dim=null model.head.train_only=false."
            )
        if dim is not None and dim < 1:
            raise InputError(f"model.head.dim={dim}: a whole number above 0, or null for the backbone's width.")
        self.kind = kind
        self.dim = dim
        self.train_only = train_only
        self.layer: nn.Module = nn.Identity()

    def build(self, hidden: int, std: float) -> None:
        """Make the layer once H is known; its weights are drawn as the backbone's are, from N(0, std)."""
        if self.kind == "none":
            return
        linear = nn.Linear(hidden, self.width(hidden))
        nn.init.normal_(linear.weight, std=std)
        nn.init.zeros_(linear.bias)
        self.layer = nn.Sequential(linear, nn.Tanh()) if self.tanh else nn.Sequential(linear)

    @property
    def num_outputs(self) -> int:
        """How many vectors stand side by side in a row now."""
        return 2 if self.kind.startswith("two_") and self.active() else 1

    @property
    def tanh(self) -> bool:
        """Whether tanh follows the linear layer."""
        return self.kind.endswith("mlp")

    def width(self, hidden: int) -> int:
        """What the layer makes of H columns."""
        return (self.dim or hidden) * (2 if self.kind.startswith("two_") else 1)

    def active(self) -> bool:
        """Whether the layer is applied now."""
        return self.kind != "none" and (self.training or not self.train_only)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, H) -> (N, D)``; ``(N, H)`` where the head is not active."""
        out: Tensor = self.layer(x) if self.active() else x
        return out
