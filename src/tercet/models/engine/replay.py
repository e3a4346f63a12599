"""Forward and backward passes as CUDA graphs, which the host starts in one call each instead of a thousand.

A graph has fixed shapes: the number of rows as it is, the number of tokens and the longest row rounded up. Each combination
is captured when it is first met.
"""

import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from tercet.messages import warn_once
from tercet.models.engine import triton_kernels as kernels
from tercet.models.engine.packing import LONG
from tercet.types import RowIndex, TokenBatch, TokenState

Embed = Callable[[TokenBatch], Tensor]  # n rows to (n, ...)
MOST_GRAPHS = 24  # each holds a gradient of all weights
WARMUP = 2  # passes before a capture, in which libraries allocate what they keep


def rounded_tokens(tokens: int) -> int:
    """The number of tokens that a graph has for so many: up to an eighth more.

    >>> [rounded_tokens(n) for n in (1, 100, 1000, 1800, 14000)]
    [64, 128, 1024, 1920, 14336]
    """
    step = max(64, 1 << max(0, (tokens - 1).bit_length() - 4))
    return -(-tokens // step) * step


class Replay:
    """Replays ``function``, n rows of texts to ``(n, ...)``, with its gradient for ``parameters``.

    Not for recomputed chunks. A pass whose backward pass is to come keeps the memory of all graphs: until then others run
    without.
    """

    def __init__(self) -> None:
        self.graphs: dict[tuple[Any, ...], _Graph] = {}
        self.pool: Any = None
        self.pending: weakref.ref[_Pending] | None = None

    def can_run(self, rows: TokenBatch, parameters: Sequence[Tensor]) -> bool:
        """Whether this pass can be replayed: training on a GPU, short rows, whole weights, no pass that is still pending."""
        if not torch.is_grad_enabled() or not rows.ids.is_cuda or torch.cuda.is_current_stream_capturing():
            return False
        short = int(rows.lengths.max()) <= LONG and kernels.available(rows.ids.device)
        whole = not any(isinstance(p, DTensor) for p in parameters)
        return short and whole and (self.pending is None or self.pending() is None)

    def __call__(self, function: Embed, rows: TokenBatch, parameters: Sequence[Tensor], mode: tuple[Any, ...]) -> Tensor:
        """``function(rows)``; ``mode`` is what else decides which operations it runs."""
        tokens, longest = rounded_tokens(len(rows.ids)), max(16, 1 << (int(rows.lengths.max()) - 1).bit_length())
        precision = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        fields = rows.state.set_fields()
        key = (tokens, longest, len(rows), *fields, precision, mode)
        graph = self.graphs.get(key)
        if graph is None:
            if len(self.graphs) == MOST_GRAPHS:
                warn_once(f"More than {MOST_GRAPHS} sizes of batches: others run without CUDA graphs.")
                return function(rows)
            if self.pool is None:
                self.pool = torch.cuda.graph_pool_handle()
            graph = self.graphs[key] = _Graph(function, rows, tokens, longest, parameters, self.pool)
        graph.load(rows)
        pending = _Pending()
        self.pending = weakref.ref(pending)
        out: Tensor = _Run.apply(graph, pending, *graph.parameters)  # type: ignore[no-untyped-call]
        return out


class _Pending:
    """Lives as long as a pass can still be differentiated."""


class _Graph:
    """The captured passes of one shape."""

    def __init__(
        self, function: Embed, rows: TokenBatch, tokens: int, longest: int, parameters: Sequence[Tensor], pool: Any
    ) -> None:  # fmt: skip
        start, device = time.perf_counter(), rows.ids.device
        self.parameters = list(parameters)
        self.tokens = tokens
        self.ids = rows.ids.new_zeros(tokens)
        self.state = rows.state.map(lambda x: x.new_zeros(tokens, *x.shape[1:]))
        self.index = torch.zeros(2 * len(rows) + 2 * tokens, dtype=torch.long, device=device)
        parts = self.index.split([len(rows), len(rows), tokens, tokens])
        self.rows = TokenBatch(self.ids, rows.lengths, self.state)
        self.rows.index = RowIndex(rows.lengths, longest, *parts)
        self.load(rows)
        precision = torch.get_autocast_dtype("cuda")
        # The cache of autocast would keep casts of the weights that a replay does not make again.
        autocast = torch.autocast("cuda", precision, torch.is_autocast_enabled("cuda"), cache_enabled=False)
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        # A capture draws nothing: a run that is resumed captures in other steps.
        with torch.random.fork_rng([device]), autocast:
            with torch.cuda.stream(side):
                for _ in range(WARMUP):
                    out = function(self.fresh())
                    torch.autograd.grad(out, self.parameters, torch.zeros_like(out), allow_unused=True)
                del out
            torch.cuda.current_stream(device).wait_stream(side)
            torch.cuda.synchronize(device)
            self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.forward, pool=pool, capture_error_mode="thread_local"):
                out = function(self.fresh())
            self.grad_out = torch.zeros_like(out)
            with torch.cuda.graph(self.backward, pool=pool, capture_error_mode="thread_local"):
                self.grads = torch.autograd.grad(out, self.parameters, self.grad_out, allow_unused=True)
            self.out = out.detach()
        self.seconds = time.perf_counter() - start

    def fresh(self) -> TokenBatch:
        """The rows of the graph, without what was derived from them."""
        index = self.rows.index
        rows = TokenBatch(self.ids, self.rows.lengths, TokenState(**self.state.set_fields()))
        rows.index = RowIndex(index.lengths, index.longest, index.start, index.length, index.row, index.position)
        return rows

    def load(self, rows: TokenBatch) -> None:
        """Copy a batch into the graph; tokens beyond it keep old ids, which are valid and belong to no row."""
        index = torch.cat(RowIndex.parts(rows.lengths, self.tokens)).pin_memory()
        self.index.copy_(index, non_blocking=True)
        n, own = len(rows.ids), self.state.set_fields()
        pairs = [(self.ids, rows.ids), *((own[name], x) for name, x in rows.state.set_fields().items())]
        for to, x in pairs:
            to[:n].copy_(x)


class _Run(torch.autograd.Function):
    """Replay the forward pass; then the backward pass."""

    @staticmethod
    def forward(ctx: Any, graph: _Graph, pending: _Pending, *parameters: Tensor) -> Tensor:
        ctx.graph, ctx.pending = graph, pending
        graph.forward.replay()
        return graph.out.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        graph = ctx.graph
        graph.grad_out.copy_(grad)
        graph.backward.replay()
        ctx.pending = None
        used = [x for x in graph.grads if x is not None]
        copies = iter(torch._foreach_mul(used, 1.0))  # the next replay overwrites its own
        return None, None, *(None if x is None else next(copies) for x in graph.grads)
