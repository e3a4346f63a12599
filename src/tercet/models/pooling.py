"""Pooling and projection heads."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from tercet.errors import check_choice, require
from tercet.types import at_least_float32

Pooling = Callable[[Any, Tensor], Tensor]  # a backbone's output and mask (n, L) to (n, H)


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    # In float32: bfloat16 does not hold all counts above 256, and float16 no sum above 65,504.
    total = (hidden * mask[..., None]).sum(1, dtype=torch.promote_types(hidden.dtype, torch.float32))
    return (total / mask.sum(1, keepdim=True)).to(hidden.dtype)


def _max(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden.masked_fill(~mask[..., None].bool(), torch.finfo(hidden.dtype).min).amax(1)


def _weighted_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """The mean with the weights 1, 2, 3, ... for the positions (SGPT: Muennighoff 2022, arXiv:2202.08904, section 4.1)."""
    return _mean(hidden, (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).float())


def _mean_with_layer(layer: int) -> Pooling:
    """The mean over tokens and over two layers: the last, and ``layer`` (0 is the embedding layer)."""
    return lambda out, mask: _mean((out.hidden_states[layer] + out.hidden_states[-1]) / 2, mask)


POOLINGS: dict[str, Pooling] = {
    "cls": lambda out, mask: out.last_hidden_state[:, 0],  # the first token of the last layer
    "cls_pooler": lambda out, mask: out.pooler_output,  # the first token through the model's pooler (BERT: linear and tanh)
    "mean": lambda out, mask: _mean(out.last_hidden_state, mask),  # over all tokens, special ones included as usual
    "weighted_mean": lambda out, mask: _weighted_mean(out.last_hidden_state, mask),  # later tokens count more
    # Quick-Thoughts' bag of words
    "sum": lambda out, mask: (out.last_hidden_state * mask[..., None].to(out.last_hidden_state.dtype)).sum(1),
    "max": lambda out, mask: _max(out.last_hidden_state, mask),  # in each dimension
    "final": lambda out, mask: out.pooler_output,  # the final state of a recurrent backbone, of both directions
    "last": lambda out, mask: out.last_hidden_state[torch.arange(len(mask), device=mask.device), mask.sum(1) - 1],  # causal
    "first_last": _mean_with_layer(1),  # SimCSE's avg_first_last since 2024
    "static_last": _mean_with_layer(0),  # gave the 56.70 of SimCSE's Table 5
    "top_two": _mean_with_layer(-2),
}
WORD_ONLY_POOLINGS = frozenset({"final", "sum"})  # for word-level encoders only
WORD_POOLINGS = ("final", "mean", "sum", "max")  # all that a word-level encoder can have
NEEDS_FIRST = frozenset({"cls", "cls_pooler"})  # poolings that read first tokens only
NEEDS_ALL_LAYERS = frozenset({"first_last", "static_last", "top_two"})


class Head(nn.Module):
    """Projection head: ``none``, ``linear`` (H to D) or ``mlp`` (H to D, then tanh: SimCSE's); ``dim`` None means D = H.

    ``two_linear`` and ``two_mlp`` are two heads on one backbone, side by side: Quick-Thoughts' f and g, of D columns each.
    ``folder`` is what follows pooling in the folder or hub id of the encoder's pretrained backbone, with its weights: the Dense
    layers of sentence-transformers, or a head that Tercet has saved. With ``train_only`` the head is skipped outside training
    (SimCSE's ``mlp_only_train``: unsupervised models are better without, arXiv:2104.08821 Table 6).

    >>> head = Head(kind="mlp", dim=2)
    >>> head.build(hidden=4, std=0.02)
    >>> head(torch.zeros(3, 4)).shape
    torch.Size([3, 2])
    """

    def __init__(self, kind: str = "none", dim: int | None = None, train_only: bool = False) -> None:
        super().__init__()
        check_choice("kind", kind, ("none", "linear", "mlp", "two_linear", "two_mlp", "folder"))
        unused = f"`kind`={kind} has neither dim ({dim}) nor train_only ({train_only})"
        plain = kind not in ("none", "folder") or (dim is None and not train_only)
        require(plain, f"{unused}. Use `kind`=linear or mlp, or `dim`=null `train_only`=false.")
        require(dim is None or dim >= 1, f"`dim`={dim}: a whole number above 0, or null for the backbone's width.")
        self.kind, self.dim, self.train_only = kind, dim, train_only
        self.tanh, self.two = kind.endswith("mlp"), kind.startswith("two_")
        self.layer: nn.Module | None = None

    def build(self, hidden: int, std: float) -> None:
        """Make the layer once H is known; its weights are drawn as the backbone's are, from N(0, std)."""
        if self.kind == "none":
            return
        linear = nn.Linear(hidden, self.width(hidden))
        nn.init.normal_(linear.weight, std=std)
        nn.init.zeros_(linear.bias)
        self.layer = nn.Sequential(linear, nn.Tanh()) if self.tanh else nn.Sequential(linear)

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"kind": self.kind, "dim": self.dim, "train_only": self.train_only}

    @property
    def num_outputs(self) -> int:
        """How many embeddings are side by side in a row now: 1 or 2."""
        return 2 if self.two and self.active() else 1

    def width(self, hidden: int) -> int:
        """The number of output columns for H input columns."""
        return (self.dim or hidden) * (2 if self.two else 1)

    def active(self) -> bool:
        """Whether the layer is applied now."""
        return self.layer is not None and (self.training or not self.train_only)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, H) -> (N, D)``; ``(N, H)`` where the head is not active."""
        return cast(Tensor, self.layer(x)) if self.layer is not None and self.active() else x


class LayeredHead(Head):
    """The layers after pooling that a folder of sentence-transformers has, where ``Head`` cannot describe them; in order.

    Each of ``layers`` is ``{"type": "Normalize"}``, ``{"type": "Truncate", "dim": D}`` (the first D columns, if there are more)
    or ``{"type": "Dense", "dim": D, "bias": true, "activation": "Tanh"}``, where ``activation`` is the name of a module of
    ``torch.nn`` without arguments.

    >>> head = LayeredHead([{"type": "Normalize"}, {"type": "Dense", "dim": 3, "bias": False, "activation": "Identity"}])
    >>> head.build(hidden=4, std=0.02)
    >>> head(torch.ones(2, 4)).shape
    torch.Size([2, 3])
    """

    def __init__(self, layers: Sequence[Mapping[str, Any]]) -> None:
        super().__init__()
        self.kind, self.layers = "layers", [dict(layer) for layer in layers]

    def build(self, hidden: int, std: float) -> None:
        """Make the layers once H is known."""
        made: list[nn.Module] = []
        for layer in self.layers:
            dense = layer["type"] == "Dense"
            parts = [nn.Linear(hidden, layer["dim"], layer["bias"]), getattr(nn, layer["activation"])()] if dense else []
            made.append(nn.Sequential(*parts))
            hidden = layer["dim"] if dense else hidden
        self.layer = nn.ModuleList(made)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, H) -> (N, D)``."""
        modules: Any = self.layer
        for layer, module in zip(self.layers, modules, strict=True):
            unit = layer["type"] == "Normalize"
            x = nn.functional.normalize(at_least_float32(x), dim=-1).to(x.dtype) if unit else module(x)[..., : layer["dim"]]
        return x

    def width(self, hidden: int) -> int:
        """The number of output columns for H input columns."""
        for layer in self.layers:
            cut = hidden if layer["type"] == "Truncate" else math.inf  # sentence-transformers ignores a larger truncate_dim
            hidden = int(min(layer.get("dim", hidden), cut))
        return hidden

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, and the kind."""
        return {"kind": self.kind, "layers": self.layers}


def make_head(settings: Mapping[str, Any]) -> Head:
    """The head that ``Head.settings`` or ``LayeredHead.settings`` describes."""
    return LayeredHead(settings["layers"]) if "layers" in settings else Head(**settings)
