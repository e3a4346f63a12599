"""Attention over rows of tokens that are concatenated without padding; each token sees its own row only.

One attention function, registered with ``transformers``, does this for its models as they are: linear layers,
normalization and dropout process real tokens only, and no model is reimplemented.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from tercet.messages import warn_once
from tercet.models.engine import transformers_compat as compat
from tercet.models.engine import triton_kernels as kernels
from tercet.models.engine.deterministic_dropout import DropoutSeeds, apply_dropout, draw_kept, kept_scale
from tercet.rng import derive_seed
from tercet.types import RowIndex, TokenBatch, runs_on_cpu, send

NAME = "tercet"
LONG = 128  # tokens; in shorter rows attention is a few percent of a layer's work (its scores: L / 6H of the linear layers')
KEY_VALUE = (("key", "value"), ("k_lin", "v_lin"))  # names of the projections in BERT and relatives, and in DistilBERT


@dataclass(eq=False)
class Packing:
    """What attention needs to know of the rows in one forward pass."""

    index: RowIndex
    packed: bool = True  # rows are concatenated, in shape (1, T); otherwise they are padded
    first_token_only: bool = False  # the last layer computes the first token of each row and no other
    dropout_seeds: DropoutSeeds | None = None  # of deterministic dropout; None for torch's
    attend: Tensor | None = None  # (T,), of packed rows: false for tokens that no token attends to
    all_hidden: Tensor | None = field(default=None, init=False)  # of all tokens, for a layer whose input is the first tokens

    @cached_property
    def groups(self) -> list[tuple[int, int]]:
        """The number and the length of adjacent rows of equal length."""
        return [(sum(1 for _ in rows), n) for n, rows in groupby(self.index.lengths.tolist())]

    @cached_property
    def padding_is_wasteful(self) -> bool:
        """Whether padding would double the work of attention, in rows long enough for that to exceed a kernel's overhead."""
        lengths, longest = self.index.lengths, self.index.longest
        return longest >= LONG and 2 * int(lengths.square().sum()) <= len(lengths) * longest**2


class AttentionSettings(NamedTuple):
    """What a layer of the model asks of attention."""

    dropout: float = 0.0
    scale: float | None = None  # of the scores; None is d ** -0.5
    window: int | None = None  # only tokens that are nearer than this are seen
    seed: Tensor | None = None  # one for each query, determines what is dropped; None draws from torch
    number: int = 0  # of the layer; ``attend_short`` mixes it into the seeds, which are the layer's for all others


# Compiled layers call it as it is: its way depends on the lengths of the rows.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None,
    dropout: float = 0.0, packing: Packing | None = None, sliding_window: int | None = None, **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The function that ``transformers`` calls: ``(1 or n, heads, T or L, d)`` each, to ``(1 or n, T or L, heads, d)``.

    Without ``packing`` it is torch's attention on padded rows.
    """
    if packing is None:
        options = {"dropout": dropout, "scaling": scaling, **others}
        return compat.sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    seed = packing.dropout_seeds.seed if packing.dropout_seeds is not None and dropout > 0 else None
    settings = AttentionSettings(dropout, scaling, sliding_window, seed, 0 if seed is None else compat.module_number(module))
    chosen = choose_attention(query, packing, settings) if packing.packed else None
    if seed is not None and chosen is not attend_short:  # whose kernel does that
        settings = settings._replace(seed=derive_seed(seed, settings.number))
    if chosen is None:
        return _attend(query, key, value, attention_mask, settings).transpose(1, 2), None
    if (hidden := packing.all_hidden) is not None:  # the query is of first tokens only, keys and values are of all
        packing.all_hidden, shape = None, (key.shape[1], key.shape[3])
        projections = [getattr(module, name) for name in key_value_names(module) or ()]
        if chosen is attend_by_length and _are_plain(projections, query):
            return _attend_hidden(query, hidden, projections, packing, settings), None
        key, value = (project(hidden).unflatten(-1, shape).transpose(1, 2) for project in projections)
    return chosen(query, key, value, packing, settings), None


def choose_attention(query: Tensor, packing: Packing, settings: AttentionSettings) -> Callable[..., Tensor]:
    """The fastest implementation for these rows on this device; all give the same result."""
    if runs_on_cpu(query.device):
        return attend_by_length
    if kernels.available(query.device, packing.index.longest, query.shape[-1]):
        return attend_short
    nested = settings.window is None and settings.seed is None and packing.attend is None and packing.padding_is_wasteful
    works = nested and _nested_attention_works(query.device, query.dtype, query.shape[-1])
    return attend_nested if works else attend_padded


def attend_short(q: Tensor, k: Tensor, v: Tensor, rows: Packing, settings: AttentionSettings) -> Tensor:
    """One kernel for rows that fit into one block. Fastest on a GPU; dropout without seeds draws them from torch."""
    seed, first_only = settings.seed, q.shape[2] != k.shape[2]
    if seed is None and settings.dropout > 0:
        seed = torch.empty(1, q.shape[2], dtype=torch.long, device=q.device).random_()
    # Some models give queries and keys in float32 under autocast, which casts for torch's attention.
    dtype = autocast_dtype(q.device) or v.dtype
    query, key, value = (x.squeeze(0).transpose(0, 1).to(dtype) for x in (q, k, v))
    place = (rows.index.start, rows.index.length, rows.index.longest)
    drawn = None if seed is None else seed.squeeze(0)
    return kernels.short_attention(
        query, key, value, *place, settings.scale, settings.dropout, drawn, rows.attend, settings.number, settings.window,
        first_only,
    )[None]  # fmt: skip


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The type that autocast computes in on ``device``; None where it is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def attend_by_length(q: Tensor, k: Tensor, v: Tensor, rows: Packing, settings: AttentionSettings) -> Tensor:
    """One dense call for each run of rows of equal length. Fastest on a CPU."""
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (q, k, v))  # an index's gradient would be a copy
    if settings.seed is not None:
        return _DroppedByLength.apply(q, k, v, rows, settings)[None]  # type: ignore[no-untyped-call, no-any-return]
    parts = []
    for n, mask, *qkv in _runs(rows, settings.window, q, k, v):
        q, k, v = (_by_head(x, n) for x in qkv)
        parts.append(_attend(q, k, v, mask, settings).transpose(1, 2).flatten(0, 1))
    return torch.cat(parts)[None]


def _are_plain(projections: list[nn.Linear], query: Tensor) -> bool:
    """Whether their weights are all that they compute with, in float32 at least, for as many heads as the query has."""
    exact = query.dtype in (torch.float32, torch.float64) and autocast_dtype(query.device) is None
    size = query.shape[1] * query.shape[3]
    return exact and all(compat.is_plain_linear(x) and x.out_features == size for x in projections)


def _attend_hidden(
    q: Tensor, hidden: Tensor, projections: list[nn.Linear], rows: Packing, settings: AttentionSettings
) -> Tensor:
    """Attention of first tokens to ``hidden (1, T, H)``, whose keys and values are not computed.

    The score of a key W x + b is q · (W x + b) = (Wᵀ q) · x + q · b, and the sum of values is W times that of hidden states, so
    that the weights are multiplied by one vector for each row, not for each token.
    """
    (key, value), x = projections, hidden.squeeze(0)
    q = q.squeeze(0) * (settings.scale or q.shape[-1] ** -0.5)
    by_head = (q.shape[0], 1, q.shape[2])
    of_key, of_value = (projection.weight.unflatten(0, by_head[::2]) for projection in (key, value))
    shift = q.new_zeros(q.shape[:2]) if key.bias is None else (q * key.bias.view(by_head)).sum(-1)
    of_rows = [torch.bmm(q, of_key).transpose(0, 1), x, shift.T]
    if settings.seed is not None:
        of_rows.append(derive_seed(settings.seed[0][:, None], torch.arange(len(q), device=q.device)))
    parts = []
    for n, mask, own, others, added, *seed in _runs(rows, settings.window, *of_rows):
        others = others.view(n, -1, x.shape[-1])
        scores = torch.baddbmm(added[..., None], own, others.mT)
        if mask is not None:
            scores = scores[:, :, None].masked_fill(~mask, torch.finfo(scores.dtype).min).squeeze(2)
        share = scores.softmax(-1)
        if settings.dropout > 0:
            share = apply_dropout(share, settings.dropout, seed[0] if seed else None)
        parts.append(torch.cat([torch.bmm(share, others), share.sum(-1, keepdim=True)], -1))
    mixed, total = torch.cat(parts).transpose(0, 1).split([x.shape[-1], 1], -1)
    out = torch.bmm(mixed, of_value.mT)
    if value.bias is not None:
        out = torch.addcmul(out, total, value.bias.view(by_head))  # after dropout the shares' sum is not 1
    return out.transpose(0, 1).contiguous()[None]  # as the others: compiled layers are not compiled again


def _runs(rows: Packing, window: int | None, q: Tensor, k: Tensor, *more: Tensor) -> Iterator[tuple[Any, ...]]:
    """For each run of rows of equal length: their number, which keys are seen (None: all), and their part of each tensor.

    A tensor has something for each query, as ``q``, or for each token, as ``k``.
    """
    tokens = [n * length for n, length in rows.groups]
    queries = tokens if len(q) == len(k) else [n for n, _ in rows.groups]
    parts = [x.split(queries if len(x) == len(q) else tokens) for x in (q, k, *more)]
    attends = [None] * len(tokens) if rows.attend is None else rows.attend.split(tokens)
    for (n, length), attend, *own in zip(rows.groups, attends, *parts, strict=True):
        mask = _window_mask(len(own[0]) // n, length, window, q.device)
        if attend is not None:
            seen = attend.view(n, 1, 1, length)
            mask = seen if mask is None else mask & seen
        yield n, mask, *own


class _DroppedByLength(torch.autograd.Function):
    """``attend_by_length`` of ``(T, heads, d)`` with dropout by seed; left to autograd it takes half as long again.

    It computes in float32 also where autocast asks for half precision, in which a CPU is slow with so small matrices.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, rows: Packing, settings: AttentionSettings) -> Tensor:
        assert settings.seed is not None
        ctx.rows, ctx.settings, ctx.scale = rows, settings, settings.scale or q.shape[-1] ** -0.5
        ctx.inputs = [(x.shape, x.dtype) for x in (q, k, v)]
        seeds = derive_seed(settings.seed[0][:, None], torch.arange(q.shape[1], device=q.device))
        out, saved = v.new_empty(len(q), *v.shape[1:]), []
        with torch.autocast(q.device.type, enabled=False):
            runs = _runs(rows, settings.window, q, k, v, out)
            for (n, mask, *parts, to), kept in zip(runs, _draw_by_length(rows, seeds, settings.dropout), strict=True):
                queries, keys, values = (_matrices(x, n) for x in parts)
                scores = torch.bmm(queries, keys.mT).mul_(ctx.scale)
                if mask is not None:
                    scores.unflatten(0, (n, -1)).masked_fill_(~mask, torch.finfo(scores.dtype).min)
                share = _softmax(scores)
                dropped = share * _factor(kept, settings.dropout, share.dtype)
                _by_head(to, n).copy_(torch.bmm(dropped, values).unflatten(0, (n, -1)))
                saved += [queries, keys, values, share, kept]
        ctx.save_for_backward(*saved)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        found = [grad.new_empty(shape, dtype=dtype) for shape, dtype in ctx.inputs]
        with torch.autocast(grad.device.type, enabled=False):
            for n, mask, *to, own in _runs(ctx.rows, ctx.settings.window, *found, grad):
                own, (queries, keys, values, share, kept) = _matrices(own, n), (next(saved) for _ in range(5))
                factor = _factor(kept, ctx.settings.dropout, share.dtype)
                of_share = torch.bmm(own, values.mT).mul_(factor)
                of_scores = of_share.sub_((of_share * share).sum(-1, keepdim=True)).mul_(share).mul_(ctx.scale)
                if mask is not None:  # of a token that sees none all scores are constants
                    of_scores.unflatten(0, (n, -1)).masked_fill_(~mask, 0)
                pairs = (of_scores, keys), (of_scores.mT, queries), ((share * factor).mT, own)
                for part, pair in zip(to, pairs, strict=True):
                    _by_head(part, n).copy_(torch.bmm(*pair).unflatten(0, (n, -1)))
        return *found, None, None


def _matrices(x: Tensor, n: int) -> Tensor:
    """``(n · L, heads, d)`` as ``(n · heads, L, d)``, in one copy, in float32 at least."""
    return _by_head(x, n).to(torch.promote_types(x.dtype, torch.float32), memory_format=torch.contiguous_format).flatten(0, 1)


def _draw_by_length(rows: Packing, seeds: Tensor, p: float) -> Iterator[Tensor]:
    """Which keys are kept in each run, ``(n · heads, L, L)``, from seeds ``(T, heads)``, of queries; in few calls."""
    one_query = len(seeds) == len(rows.index.lengths)
    parts = seeds.split([n if one_query else n * length for n, length in rows.groups])
    for _, same in groupby(zip(rows.groups, parts, strict=True), lambda run: -(-run[0][1] // 4)):  # a draw serves four keys
        runs = [(length, _by_head(part[..., None], n).flatten(0, 1)) for (n, length), part in same]
        kept = draw_kept(torch.cat([own.flatten() for _, own in runs]), p, max(length for length, _ in runs))
        for (length, own), part in zip(runs, kept.split([own.numel() for _, own in runs]), strict=True):
            yield part[:, :length].unflatten(0, own.shape[:2])


def _factor(kept: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    return kept.view(torch.uint8).to(dtype, memory_format=torch.contiguous_format).mul_(kept_scale(p))


def _softmax(scores: Tensor) -> Tensor:
    """Over the last dimension, in place; torch's is slow where that has fewer elements than a vector of the CPU."""
    if scores.shape[-1] >= 16:
        return scores.softmax(-1)
    shares = scores.sub_(scores.amax(-1, keepdim=True)).exp_()
    return shares.div_(shares.sum(-1, keepdim=True))


def _by_head(x: Tensor, n: int) -> Tensor:
    """``(n · L, heads, d)`` as ``(n, heads, L, d)``."""
    return x.view(n, -1, *x.shape[1:]).transpose(1, 2)


def attend_padded(q: Tensor, k: Tensor, v: Tensor, rows: Packing, settings: AttentionSettings) -> Tensor:
    """Pad for the attention alone and call it once: in short rows it is a few percent of the work, and calls cost more."""
    index, first_only = rows.index, q.shape[2] != k.shape[2]
    pad = (lambda x: x[:, None]) if first_only else index.pad  # a query of each row, or all
    q = pad(q.squeeze(0).transpose(0, 1)).transpose(1, 2)
    k, v = (index.pad(x.squeeze(0).transpose(0, 1)).transpose(1, 2) for x in (k, v))
    mask = (index.mask if rows.attend is None else index.pad(rows.attend))[:, None, None]
    if (near := _window_mask(q.shape[2], k.shape[2], settings.window, q.device)) is not None:
        mask = mask & near
    if settings.seed is not None:
        settings = settings._replace(seed=pad(settings.seed[0]))
    out = _attend(q, k, v, mask, settings).transpose(1, 2)
    return (out[:, 0] if first_only else out.flatten(0, 1).index_select(0, index.in_padded))[None]


def attend_nested(q: Tensor, k: Tensor, v: Tensor, rows: Packing, settings: AttentionSettings) -> Tensor:
    """One call on nested tensors, without padding; supports neither a window, nor seeds, nor tokens that are not seen."""
    if settings.window is not None or settings.seed is not None or rows.attend is not None:
        raise ValueError("nested attention supports neither a window, nor dropout by seed, nor tokens that are not seen.")
    tokens = rows.index.lengths
    lengths = (torch.ones_like(tokens) if q.shape[2] != k.shape[2] else tokens, tokens, tokens)
    q, k, v = (_jagged(x.squeeze(0).transpose(0, 1), n).transpose(1, 2) for x, n in zip((q, k, v), lengths, strict=True))
    return _attend(q, k, v, None, settings).transpose(1, 2).values()[None]


def _jagged(tokens: Tensor, lengths: Tensor) -> Tensor:
    """``(T, heads, d)`` to a nested ``(n, L, heads, d)``; the extremes of L are passed, so that no device is read."""
    (ends,) = send([F.pad(lengths.cumsum(0), (1, 0))], tokens.device)
    least, most = int(lengths.min()), int(lengths.max())
    return torch.nested.nested_tensor_from_jagged(tokens.contiguous(), ends, min_seqlen=least, max_seqlen=most)


@cache
def _nested_attention_works(device: torch.device, dtype: torch.dtype, d: int) -> bool:
    """Whether nested attention equals padded attention here, in value and gradient, and applies dropout: checked by a run."""
    rows = Packing(TokenBatch(torch.zeros(49, device=device), torch.tensor([40, 9])).index)
    with torch.enable_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        q, k, v = (torch.randn(1, 2, 49, d, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
        try:
            got, want = (attend(q, k, v, rows, AttentionSettings()) for attend in (attend_nested, attend_padded))
            gradients = [torch.autograd.grad(out.float().square().sum(), (q, k, v)) for out in (got, want)]
            dropped = attend_nested(q, k, v, rows, AttentionSettings(0.5))
            dropped.sum().backward()
        except RuntimeError as error:  # raised by torch where it has no kernel
            warn_once(f"Attention pads its rows: nested tensors do not run here ({str(error).splitlines()[0]}).")
            return False
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    close = partial(torch.allclose, rtol=tolerance, atol=tolerance)
    # Without dropout two views would be equal.
    return close(got, want) and all(map(close, *gradients)) and not close(dropped, want)


def _window_mask(queries: int, length: int, window: int | None, device: torch.device) -> Tensor | None:
    """``(queries, length)``, true within a sliding window; None if all tokens are within it."""
    if window is None or length <= window:
        return None
    position = torch.arange(length, device=device)
    return (position[:queries, None] - position).abs() < window


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, settings: AttentionSettings) -> Tensor:
    """Attention of ``(n, heads, L, d)``, with seeds ``(n, L)``."""
    if settings.seed is None:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p=settings.dropout, scale=settings.scale)
    scores = (q * (settings.scale or q.shape[-1] ** -0.5)) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    heads = torch.arange(q.shape[1], device=q.device)[:, None]
    return apply_dropout(scores.softmax(-1), settings.dropout, derive_seed(settings.seed[:, None], heads)) @ v


def key_value_names(module: nn.Module) -> tuple[str, str] | None:
    """The names of an attention layer's key and value projections; None if they are not separate."""
    return next((names for names in KEY_VALUE if all(isinstance(getattr(module, n, None), nn.Linear) for n in names)), None)


def layer_stack(backbone: PreTrainedModel) -> nn.ModuleList | None:
    """The backbone's stack of layers; None if it does not have exactly one."""
    count = getattr(backbone.config, "num_hidden_layers", None)
    stacks = [m for m in backbone.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    return stacks[0] if len(stacks) == 1 else None


def shorten_last_layer(backbone: PreTrainedModel) -> bool:
    """Let the last layer compute first tokens only when ``packing.first_token_only`` is set; False where it cannot."""
    stack = layer_stack(backbone)
    if stack is None or not any(key_value_names(part) for part in stack[-1].modules()):
        return False
    stack[-1].register_forward_pre_hook(_select_first_tokens, with_kwargs=True)
    return True


# It changes the packing.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _select_first_tokens(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    packing = kwargs.get("packing")
    if packing is None or not packing.first_token_only or packing.all_hidden is not None:
        return None  # the last: this hook has run, for another encoder of the same backbone
    packing.all_hidden = args[0]
    if (seeds := packing.dropout_seeds) is not None and seeds.seed is not None:
        seeds.seed = seeds.seed.index_select(1, packing.index.start)
    return (args[0].index_select(1, packing.index.start), *args[1:]), kwargs


compat.register_attention(NAME, attention)
