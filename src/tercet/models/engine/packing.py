"""Rows of tokens in one flat sequence, without padding; attention stays inside each row.

One attention function, registered with ``transformers``, does it for its models as they are: linear layers,
normalisation and dropout see real tokens only, and no model is written again.
"""

from collections.abc import Callable
from functools import cache, cached_property
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tercet.messages import warn_once
from tercet.models.engine.deterministic_dropout import DropoutSeeds, apply_dropout
from tercet.rng import derive_seed
from tercet.types import pad_rows, unpad_rows

NAME = "tercet"
LONG = 128  # tokens; below, attention is some hundredths of a layer's work (its scores are L / 6H of the linear layers')
KEY_VALUE = (("key", "value"), ("k_lin", "v_lin"))  # what BERT's relatives call their projections, and DistilBERT


class Packing:
    """What attention must know: the ``length (n,)`` of the rows, and the ``noise`` that its dropout draws from.

    ``packed``: the rows stand one after the other, shape ``(1, T)``; else they are padded. ``first``: of the last layer
    only each row's first token is read, and only that is computed.
    """

    def __init__(self, length: Tensor, packed: bool, first: bool, noise: DropoutSeeds | None) -> None:
        self.packed, self.first_only, self.dropout_seeds = packed, first, noise
        self.groups = [(sum(1 for _ in rows), n) for n, rows in groupby(length.tolist())]
        self.starts = length.cumsum(0) - length
        self.lengths = length
        self.all_hidden: Tensor | None = None  # the hidden states of all tokens, where a layer was given the first ones

    @cached_property
    def uneven(self) -> bool:
        """Whether padding would double the work of attention, in rows so long that this is more than a kernel's calls."""
        longest = int(self.lengths.max()) if len(self.lengths) else 0
        return longest >= LONG and 2 * int(self.lengths.square().sum()) <= len(self.lengths) * longest**2


Way = Callable[[Tensor, Tensor, Tensor, Packing, float, float | None, int | None, Tensor | None], Tensor]


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packing: Packing | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What ``transformers`` calls: ``(1 or n, heads, T or L, d)`` each, to ``(1 or n, T or L, heads, d)``.

    Without ``packing`` it is torch's attention on padded rows, as everywhere.
    """
    if packing is None:
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others)
        return out, None
    seed = None
    if packing.dropout_seeds is not None and packing.dropout_seeds.seed is not None and dropout > 0:
        seed = derive_seed(packing.dropout_seeds.seed, int(module.tercet_number))  # type: ignore[arg-type]
    if not packing.packed:
        return _one(query, key, value, attention_mask, dropout, scaling, seed).transpose(1, 2), None
    if packing.all_hidden is not None:
        key, value = _all_tokens(module, packing.all_hidden, key.shape)
        packing.all_hidden = None
    way = choose_attention(query, packing, sliding_window, seed)
    return way(query, key, value, packing, dropout, scaling, sliding_window, seed), None


def choose_attention(query: Tensor, packing: Packing, window: int | None, seed: Tensor | None) -> Way:
    """How rows are kept apart here. All ways give the same."""
    if not query.is_cuda:
        return attend_by_length
    plain = window is None and seed is None
    return attend_nested if plain and packing.uneven and _nests(query.device, query.dtype, query.shape[-1]) else attend_padded


def _all_tokens(module: nn.Module, hidden: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Keys and values of every token, for a layer that was given the first ones alone."""
    names = key_value_names(module)
    assert names is not None
    made = [getattr(module, name)(hidden).unflatten(-1, (shape[1], shape[3])).transpose(1, 2) for name in names]
    return made[0], made[1]


def attend_by_length(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, dropout: float, scaling: float | None,
    window: int | None, seed: Tensor | None,
) -> Tensor:  # fmt: skip
    """Rows of equal length stand side by side: a dense call for each length, without a mask. Best on a CPU."""
    first = query.shape[2] != key.shape[2]
    tokens = [n * length for n, length in packing.groups]
    asked = [n for n, _ in packing.groups] if first else tokens
    seeds = [None] * len(tokens) if seed is None else seed[0].split(asked)
    parts = []
    for q, k, v, s, (n, length) in zip(
        query[0].split(asked, 1), key[0].split(tokens, 1), value[0].split(tokens, 1), seeds, packing.groups, strict=True
    ):
        q, k, v = (x.unflatten(1, (n, -1)).transpose(0, 1) for x in (q, k, v))
        mask = _band(q.shape[2], length, window, q.device)
        out = _one(q, k, v, mask, dropout, scaling, None if s is None else s.unflatten(0, (n, -1)))
        parts.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts)[None]


def attend_padded(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, dropout: float, scaling: float | None,
    window: int | None, seed: Tensor | None,
) -> Tensor:  # fmt: skip
    """Padded for the attention alone, one call: with short rows it is a few percent of the work, and calls cost more."""
    first = query.shape[2] != key.shape[2]
    length = packing.lengths
    asked = torch.ones_like(length) if first else length
    k, v = (pad_rows(x[0].transpose(0, 1), length).transpose(1, 2) for x in (key, value))
    q = pad_rows(query[0].transpose(0, 1), asked).transpose(1, 2)
    there = (torch.arange(k.shape[2]) < length[:, None]).to(q.device, non_blocking=True)[:, None, None]
    band = _band(q.shape[2], k.shape[2], window, q.device)
    mask = there if band is None else there & band
    out = _one(q, k, v, mask, dropout, scaling, None if seed is None else pad_rows(seed[0], asked))
    return unpad_rows(out.transpose(1, 2), asked)[None]


def attend_nested(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, dropout: float, scaling: float | None,
    window: int | None, seed: Tensor | None,
) -> Tensor:  # fmt: skip
    """One call of a kernel that is told where rows end: nothing is padded. It knows neither windows nor seeds."""
    if window is not None or seed is not None:
        raise ValueError("nested attention has no window and draws its own dropout.")
    lengths = [torch.ones_like(packing.lengths) if query.shape[2] != key.shape[2] else packing.lengths]
    lengths += [packing.lengths] * 2
    q, k, v = (_jagged(x[0].transpose(0, 1), n) for x, n in zip((query, key, value), lengths, strict=True))
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling)
    return out.transpose(1, 2).values()[None]


def _jagged(tokens: Tensor, length: Tensor) -> Tensor:
    """``(T, heads, d)`` to a nested ``(n, heads, L, d)``; told the extremes of ``L``, so that no device is asked."""
    ends = F.pad(length.cumsum(0), (1, 0)).to(tokens.device, non_blocking=True)
    least, most = int(length.min()), int(length.max())
    jagged = torch.nested.nested_tensor_from_jagged(tokens.contiguous(), ends, min_seqlen=least, max_seqlen=most)
    return jagged.transpose(1, 2)


@cache
def _nests(device: torch.device, dtype: torch.dtype, d: int) -> bool:
    """Whether nested tensors do here what padding does, forward and backward, and drop; tried, not believed."""
    packing = Packing(torch.tensor([40, 9]), True, False, None)
    with torch.enable_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        q, k, v = (torch.randn(1, 2, 49, d, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
        try:
            got, want = (way(q, k, v, packing, 0.0, None, None, None) for way in (attend_nested, attend_padded))
            slopes = [torch.autograd.grad(out.float().square().sum(), (q, k, v)) for out in (got, want)]
            dropped = attend_nested(q, k, v, packing, 0.5, None, None, None)
            dropped.sum().backward()
        except RuntimeError as error:  # what torch raises where there is no kernel
            warn_once(f"Attention pads its rows: nested tensors do not run here ({str(error).splitlines()[0]}).")
            return False
    near = 1e-4 if dtype == torch.float32 else 0.05
    pairs = [(got, want), *zip(*slopes, strict=True)]
    drops = not torch.allclose(dropped.float(), want.float(), near, near)  # a view would be its twin's copy
    return drops and all(torch.allclose(a.float(), b.float(), near, near) for a, b in pairs)


def _band(asked: int, length: int, window: int | None, device: torch.device) -> Tensor | None:
    if window is None or length <= window:
        return None
    place = torch.arange(length, device=device)
    return (place[:asked, None] - place).abs() < window


def _one(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, scaling: float | None, seed: Tensor | None
) -> Tensor:
    """Attention of ``(n, heads, L, d)``; ``seed (n, L)`` of the asking tokens decides what is dropped."""
    if seed is None:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout, scale=scaling)
    scores = (q * (scaling or q.shape[-1] ** -0.5)) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    heads = torch.arange(q.shape[1], device=q.device)[:, None]
    share = apply_dropout(scores.softmax(-1), dropout, derive_seed(seed[:, None], heads))
    return share @ v


def key_value_names(module: nn.Module) -> tuple[str, str] | None:
    """What an attention layer calls its keys and values, if it has them apart."""
    for names in KEY_VALUE:
        if all(isinstance(getattr(module, name, None), nn.Linear) for name in names):
            return names
    return None


def layer_stack(backbone: PreTrainedModel) -> nn.ModuleList | None:
    """The backbone's layers, one on the other, if it has one such stack."""
    count = getattr(backbone.config, "num_hidden_layers", None)
    stacks = [m for m in backbone.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    return stacks[0] if len(stacks) == 1 else None


def cut_last_layer(backbone: PreTrainedModel) -> bool:
    """Let the last layer compute first tokens only where ``packing.first_only`` asks for it; false where it cannot."""
    stack = layer_stack(backbone)
    if stack is None or not any(key_value_names(part) for part in stack[-1].modules()):
        return False
    last = stack[-1]
    if _first_tokens not in last._forward_pre_hooks.values():
        last.register_forward_pre_hook(_first_tokens, with_kwargs=True)
    return True


def _first_tokens(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    packing = kwargs.get("packing")
    if packing is None or not packing.first_only:
        return None
    starts = packing.starts.to(args[0].device, non_blocking=True)
    packing.all_hidden = args[0]
    if packing.dropout_seeds is not None and packing.dropout_seeds.seed is not None:
        packing.dropout_seeds.seed = packing.dropout_seeds.seed[:, starts]
    return (args[0][:, starts], *args[1:]), kwargs


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
