"""Forward and backward passes as CUDA graphs, which the host starts in one call each instead of a thousand.

A graph has fixed shapes: the number of rows as it is, the number of tokens and the longest row rounded up. Each combination
is captured when it is first met.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.func import functional_call

from tercet.messages import warn_once
from tercet.models.engine import triton_kernels as kernels
from tercet.models.engine.packing import autocast_dtype
from tercet.types import RowIndex, TokenBatch, TokenState, runs_on_cpu

Embed = Callable[[TokenBatch], Tensor]  # n rows to (n, ...)
MOST_GRAPHS = 24  # capturing one takes as long as some ten steps
WARMUP = 2  # passes before a capture, in which libraries allocate what they keep


def rounded_tokens(tokens: int) -> int:
    """The number of tokens that a graph has for so many: up to an eighth more, or a multiple of 256.

    >>> [rounded_tokens(n) for n in (1, 1000, 1800, 14000)]
    [256, 1024, 2048, 14336]
    """
    step = max(256, 1 << max(0, (tokens - 1).bit_length() - 4))
    return -(-tokens // step) * step


def longest_row(rows: TokenBatch) -> int:
    """The number of tokens of the longest row, which the host knows."""
    return int(rows.lengths.max())


class Replay:
    """Replays a function of n rows of texts, ``(n, ...)``, with its gradient for the trained weights of one module.

    Not for recomputed chunks. A pass whose backward pass is to come keeps the memory of all graphs: until then others run
    without.
    """

    def __init__(self) -> None:
        self.graphs: dict[tuple[Any, ...], _Graph] = {}
        # Walked through once, which takes a millisecond, and where a weight or a part, as the head, is another object.
        self.parts: list[nn.Module] = []
        self.weights: list[tuple[str, nn.Parameter]] = []
        self.modules: list[nn.Module] = []
        self.places: list[tuple[nn.Module, str, nn.Parameter]] = []  # the weights where they are attributes
        self.dropouts: list[Any] = []
        self.state: list[Any] = []  # of the weights: where they are, of which type, and which are trained
        self.trained: dict[str, nn.Parameter] = {}
        self.weights_fit = False  # whether all are in float32 and some are trained
        self.shared: _Shared | None = None
        self.impossible = False  # weights are sharded, or a capture has failed
        self.pending: weakref.ref[_Pending] | None = None

    def can_run(self, module: nn.Module, rows: TokenBatch, head_size: int) -> bool:
        """Whether this pass can be replayed: in training on a GPU, and no other pass is still pending.

        Rows have to be short, and weights whole (not sharded) and in float32.
        """
        if self.impossible or runs_on_cpu(rows.ids.device) or not torch.is_grad_enabled():
            return False
        replaced = list(module.children()) != self.parts
        if replaced or any(getattr(owner, name, None) is not p for owner, name, p in self.places):
            self.parts = list(module.children())
            self.weights, self.modules = list(module.named_parameters()), list(module.modules())
            self.places = [(part, *own) for part in self.modules for own in part.named_parameters(recurse=False)]
            self.dropouts = [part for part in self.modules if isinstance(part, nn.Dropout)]
            self.impossible = any(isinstance(p, DTensor) for _, p in self.weights)
            self.state = []
        if self.impossible:
            return False
        state = [(p.data_ptr(), p.dtype, p.requires_grad) for _, p in self.weights]
        if state != self.state:  # moved, cast, frozen or unfrozen
            self.graphs, self.shared, self.state = {}, None, state
            self.trained = {name: p for name, p in self.weights if p.requires_grad}
            self.weights_fit = bool(self.trained) and all(p.dtype == torch.float32 for _, p in self.weights)
        short = kernels.available(rows.ids.device, longest_row(rows), head_size)
        return self.weights_fit and short and (self.pending is None or self.pending() is None)

    def __reduce__(self) -> Any:
        """A copy, also of a model that is copied or pickled, begins without graphs."""
        return Replay, ()

    def __call__(self, function: Embed, module: nn.Module, rows: TokenBatch, *settings: Any) -> Tensor:
        """``function(rows)`` where ``can_run`` says so; ``settings`` are what else decides on its operations."""
        tokens, longest = rounded_tokens(len(rows.ids)), kernels.block_size(longest_row(rows))
        precision = autocast_dtype(rows.ids.device)
        key = (
            tokens,
            longest,
            len(rows),
            *rows.state.set_fields(),
            precision,
            *settings,
            *(part.training for part in self.modules),
            *(part.p for part in self.dropouts),
        )
        graph = self.graphs.get(key)
        if graph is None and len(self.graphs) == MOST_GRAPHS:
            warn_once(f"More than {MOST_GRAPHS} sizes of batches: others run without CUDA graphs.")
        elif graph is None:
            graph = self._capture(key, function, module, rows)
        if graph is None:
            return function(rows)
        graph.load(rows)
        pending = _Pending()
        self.pending = weakref.ref(pending)
        out: Tensor = _Run.apply(graph, pending, *self.trained.values())  # type: ignore[no-untyped-call]
        return out

    def _capture(self, key: tuple[Any, ...], function: Embed, module: nn.Module, rows: TokenBatch) -> "_Graph | None":
        """A new graph, whose number of tokens and longest row begin its key; None where there can be none."""
        graphs, shared = self.graphs, self.shared or _Shared.of(self.trained, rows.ids.device)
        self.graphs, self.shared = {}, None  # a capture that fails, in whatever way, makes the others unsafe (`_Shared`)
        try:
            graphs[key] = _Graph(function, module, self.trained, rows, key[0], key[1], shared)
        except (_CannotCaptureError, torch.OutOfMemoryError) as error:
            self.impossible = True
            torch.cuda.current_stream(rows.ids.device).wait_stream(shared.stream)  # which reads what is freed now
            reason = str(error).splitlines()[0].rstrip(".")
            warn_once(f"Passes of {type(module).__name__} run without CUDA graphs: {reason}.")
            return None
        self.graphs, self.shared = graphs, shared
        return graphs[key]


class _Pending:
    """Lives as long as a pass can still be differentiated."""


class _Shared(NamedTuple):
    """What the graphs of one module have in common; those of moved weights get another, as old ones may still be in use.

    The stream is of the weights' device: the one that torch takes by itself is of the device that was the current one first.
    It is for these graphs alone: with any graph torch frees the memory that cuBLAS has for the stream of its capture.
    """

    pool: Any
    stream: torch.cuda.Stream
    flat_grad: Tensor  # of the trained weights; each backward pass writes it, and is copied

    @staticmethod
    def of(trained: dict[str, nn.Parameter], device: torch.device) -> "_Shared":
        flat = torch.empty(sum(p.numel() for p in trained.values()), dtype=torch.float32, device=device)
        return _Shared(torch.cuda.graph_pool_handle(), torch.cuda.Stream(device), flat)


class _Function(nn.Module):
    """A function as a module, for ``functional_call`` to replace the weights of another one in it."""

    def __init__(self, function: Embed, module: nn.Module) -> None:
        super().__init__()
        self.function, self.module = function, module

    def forward(self, rows: TokenBatch) -> Tensor:
        return self.function(rows)


class _Graph:
    """The captured passes of one shape."""

    def __init__(
        self, function: Embed, module: nn.Module, trained: dict[str, nn.Parameter], rows: TokenBatch, tokens: int,
        longest: int, shared: _Shared,
    ) -> None:  # fmt: skip
        device, n = rows.ids.device, len(rows)
        self.tokens = tokens
        self.ids = rows.ids.new_zeros(tokens)
        self.state = rows.state.map(lambda x: x.new_zeros(tokens, *x.shape[1:]))
        self.index = torch.zeros(2 * n + 2 * tokens, dtype=torch.long, device=device)
        self.rows = RowIndex(rows.lengths, longest, *self.index.split([n, n, tokens, tokens]))
        self.load(rows)
        # Other names of the weights: nodes of autograd that the caller's graph still holds belong to another stream.
        weights = {f"module.{name}": p.detach().requires_grad_() for name, p in trained.items()}
        wrapped = _Function(function, module)

        def run() -> Tensor:
            out: Tensor = functional_call(wrapped, weights, (self.fresh(),))
            return out

        def differentiate(out: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
            return torch.autograd.grad(out, list(weights.values()), grad, allow_unused=True)

        # The cache of autocast would keep casts of the weights that a replay does not make again.
        precision = autocast_dtype(device)
        autocast = torch.autocast(device.type, precision, precision is not None, cache_enabled=False)
        capture = partial(torch.cuda.graph, pool=shared.pool, stream=shared.stream, capture_error_mode="thread_local")
        side = shared.stream
        side.wait_stream(torch.cuda.current_stream(device))
        # A capture draws nothing: a run that is resumed captures in other steps.
        with torch.random.fork_rng([device] if device.type == "cuda" else []), autocast:
            with torch.cuda.stream(side):
                for number in range(WARMUP):
                    with _refuse_waits() if number else nullcontext():  # what is prepared in the first pass may wait
                        out = run()
                        if not out.requires_grad:
                            raise _CannotCaptureError("no weight that is trained has a part in them")
                        differentiate(out, torch.zeros_like(out))
            torch.cuda.current_stream(device).wait_stream(side)
            self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
            with capture(self.forward):
                out = run()
            self.grad_out = torch.zeros_like(out)
            with capture(self.backward):
                grads = differentiate(out, self.grad_out)
                parts = [grad.flatten() for grad in grads if grad is not None]
                self.flat_grad = torch.cat(parts, out=shared.flat_grad[: sum(map(len, parts))])
            self.out = out.detach()
        self.shapes = [None if grad is None else grad.shape for grad in grads]
        self.sizes = [shape.numel() for shape in self.shapes if shape is not None]

    def fresh(self) -> TokenBatch:
        """The rows of the graph, without what a pass derives from them."""
        rows = TokenBatch(self.ids, self.rows.lengths, TokenState(**self.state.set_fields()))
        rows.index = replace(self.rows)
        return rows

    def load(self, rows: TokenBatch) -> None:
        """Copy a batch into the graph; tokens beyond it keep old ids, which are valid and belong to no row."""
        index = torch.cat(RowIndex.parts(rows.lengths, self.tokens)).pin_memory()
        self.index.copy_(index, non_blocking=True)
        n, own = len(rows.ids), self.state.set_fields()
        pairs = [(self.ids, rows.ids), *((own[name], x) for name, x in rows.state.set_fields().items())]
        for to, x in pairs:
            to[:n].copy_(x)


class _CannotCaptureError(RuntimeError):
    """The host would wait for the device, which a capture does not survive; or there is no gradient to capture."""


@contextmanager
def _refuse_waits() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise _CannotCaptureError(f"the host waits for the device ({str(error).splitlines()[0]})") from error
    finally:
        torch.cuda.set_sync_debug_mode(before)


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
        if ctx.pending is None:  # what the pass saved is gone
            raise RuntimeError("A replayed pass can be differentiated once. Use Execution(graphs=False) to do it again.")
        graph.grad_out.copy_(grad)
        graph.backward.replay()
        ctx.pending = None
        copy = graph.flat_grad.clone()  # the next replay overwrites its own
        parts = iter(copy.split(graph.sizes))
        return None, None, *(None if shape is None else _shaped(next(parts), shape) for shape in graph.shapes)


def _shaped(flat: Tensor, shape: torch.Size) -> Tensor:
    return flat if len(shape) == 1 else flat.view(shape)  # most weights are vectors, and a view takes microseconds
