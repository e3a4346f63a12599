"""Forward and backward passes as CUDA graphs, which the host starts in one call each instead of a thousand.

A graph has fixed shapes: the number of rows as it is, the number of tokens and the longest row rounded up. Each combination
is captured when it is first met.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.func import functional_call

from tercet.distributed.gather import world_size
from tercet.messages import warn_once
from tercet.models.engine import triton_kernels as kernels
from tercet.models.engine.packing import autocast_dtype
from tercet.types import RowIndex, TokenBatch, TokenState, rounded_tokens, runs_on_cpu

Embed = Callable[[TokenBatch], Tensor]  # n rows to (n, ...)
MOST_GRAPHS = 24  # capturing one takes as long as some ten steps
WARMUP = 2  # passes before a capture, in which libraries allocate what they keep
STAGES = 4  # of a backward pass among several processes: DDP reduces the gradients of one while the next one runs


def longest_row(rows: TokenBatch) -> int:
    """The number of tokens of the longest row, which the host knows."""
    return int(rows.lengths.max())


class Replay:
    """Replays a function of n rows of texts, ``(n, ...)``, with its gradient for the trained weights of one module.

    A pass whose backward pass is to come keeps the memory of all graphs: until then others run without. Only recomputed passes
    keep none: their backward pass replays the forward pass first.
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

    def can_run(self, module: nn.Module, rows: TokenBatch, head_size: int, recompute: bool = False) -> bool:
        """Whether this pass can be replayed: in training on a GPU, and no other pass is still pending.

        Rows have to be short, and weights whole (not sharded) and in float32. If it is to ``recompute``, dropout has to be by
        seed, so that it draws the same numbers again.
        """
        if self.impossible or runs_on_cpu(rows.ids.device) or not torch.is_grad_enabled() or not len(rows):
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
        pending = self.pending() if self.pending else None
        free = pending is None or (recompute and pending.rows is not None)
        return self.weights_fit and short and free and (not recompute or rows.state.dropout_seed is not None)

    def __reduce__(self) -> Any:
        """A copy, also of a model that is copied or pickled, begins without graphs."""
        return Replay, ()

    def __call__(
        self, function: Embed, module: nn.Module, head_size: int, settings: tuple[Any, ...], recompute: bool, rows: TokenBatch
    ) -> Tensor | None:
        """``function(rows)``, or None where it cannot be replayed; ``settings`` are what else decides on its operations."""
        if not self.can_run(module, rows, head_size, recompute):
            return None
        n, rows = len(rows), _with_more_rows(rows) if recompute else rows
        tokens, longest = rounded_tokens(len(rows.ids)), kernels.block_size(longest_row(rows))
        modes = (*(part.training for part in self.modules), *(part.p for part in self.dropouts))
        key = (tokens, longest, len(rows), *rows.state.set_fields(), autocast_dtype(rows.ids.device), *settings, *modes)
        graph = self.graphs.get(key)
        if graph is None and len(self.graphs) == MOST_GRAPHS:
            warn_once(f"More than {MOST_GRAPHS} sizes of batches: others run without CUDA graphs.")
        elif graph is None:
            graph = self._capture(key, function, module, rows)
        if graph is None:
            return None
        graph.load(rows)
        pending = _Pending(rows if recompute else None)
        self.pending = weakref.ref(pending)
        out = graph.run(pending, self.trained)
        return out if len(out) == n else out[:n]

    def _capture(self, key: tuple[Any, ...], function: Embed, module: nn.Module, rows: TokenBatch) -> "_Graph | None":
        """A new graph, whose number of tokens and longest row begin its key; None where there can be none."""
        graphs, shared = self.graphs, self.shared or _Shared.of(self.trained, rows.ids.device)
        self.graphs, self.shared = {}, None  # a capture that fails, in whatever way, makes the others unsafe (`_Shared`)
        try:
            graphs[key] = _Graph(function, module, self.trained, rows, key[0], key[1], shared)
        except (_CannotCaptureError, torch.OutOfMemoryError) as error:
            if self.pending and self.pending():
                raise  # another chunk is still to be replayed, by a graph that is unsafe now
            self.impossible = True
            torch.cuda.current_stream(rows.ids.device).wait_stream(shared.stream)  # which reads what is freed now
            reason = str(error).splitlines()[0].rstrip(".")
            warn_once(f"Passes of {type(module).__name__} run without CUDA graphs: {reason}.")
            return None
        self.graphs, self.shared = graphs, shared
        return graphs[key]


@dataclass(eq=False)
class _Pending:
    """Lives as long as a pass can still be differentiated; with the ``rows`` that this takes if it is recomputed."""

    rows: TokenBatch | None


def _with_more_rows(rows: TokenBatch) -> TokenBatch:
    """Up to an eighth more rows, of one token each: chunks have many numbers of rows, and each takes a graph."""
    step = max(8, 1 << max(0, (len(rows) - 1).bit_length() - 4))
    more = -len(rows) % step

    def first(x: Tensor) -> Tensor:
        return x[:1].expand(more, *x.shape[1:])

    one = TokenBatch(first(rows.ids), torch.ones(more, dtype=torch.long), rows.state.map(first))
    return TokenBatch.concat([rows, one]) if more else rows


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


class _Stage(NamedTuple):
    """A captured part of a backward pass, and what it computes: gradients of weights, one after the other in ``flat_grad``."""

    graph: torch.cuda.CUDAGraph
    names: list[str]
    shapes: list[torch.Size]
    flat_grad: Tensor


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
        self.rows = replace(RowIndex.of(rows.lengths, self.index, tokens), longest=longest)
        self.load(rows)
        # Other names of the weights: nodes of autograd that the caller's graph still holds belong to another stream.
        weights = {name: p.detach().requires_grad_() for name, p in trained.items()}
        wrapped, named = _Function(function, module), {f"module.{name}": x for name, x in weights.items()}
        # The cache of autocast would keep casts of the weights that a replay does not make again.
        precision = autocast_dtype(device)
        autocast = torch.autocast(device.type, precision, precision is not None, cache_enabled=False)
        capture = partial(torch.cuda.graph, pool=shared.pool, stream=shared.stream, capture_error_mode="thread_local")
        side = shared.stream
        side.wait_stream(torch.cuda.current_stream(device))
        # A capture draws nothing: a run that is resumed captures in other steps.
        with torch.random.fork_rng([device] if device.type == "cuda" else []), autocast, _cut(module) as cuts:
            with torch.cuda.stream(side):
                for number in range(WARMUP):
                    with _refuse_waits() if number else nullcontext():  # what is prepared in the first pass may wait
                        out: Tensor = functional_call(wrapped, named, (self.fresh(),))
                        if not out.requires_grad:
                            raise _CannotCaptureError("no weight that is trained has a part in them")
                        _differentiate(out, torch.zeros_like(out), cuts, weights, shared.flat_grad, nullcontext)
                        del out  # and its activations, before those of the next pass
            torch.cuda.current_stream(device).wait_stream(side)
            self.forward = torch.cuda.CUDAGraph()
            with capture(self.forward):
                out = functional_call(wrapped, named, (self.fresh(),))
            self.grad_out = torch.zeros_like(out)
            self.stages = _differentiate(out, self.grad_out, cuts, weights, shared.flat_grad, capture)
            self.out = out.detach()

    def run(self, pending: _Pending, trained: dict[str, nn.Parameter]) -> Tensor:
        """Replay the forward pass. Each stage is a node of autograd, so that weights get gradients stage by stage."""
        out: Tensor | None = None
        for stage in reversed(self.stages):
            out = _Run.apply(self, stage, pending, out, *(trained[name] for name in stage.names))  # type: ignore[no-untyped-call]
        assert out is not None
        return out

    def fresh(self) -> TokenBatch:
        """The rows of the graph, without what a pass derives from them."""
        rows = TokenBatch(self.ids, self.rows.lengths, TokenState(**self.state.set_fields()))
        rows.index = replace(self.rows)
        return rows

    def load(self, rows: TokenBatch) -> None:
        """Copy a batch into the graph; tokens beyond it keep old ids, which are valid and belong to no row."""
        self.index.copy_(rows.layout)
        n, own = len(rows.ids), self.state.set_fields()
        pairs = [(self.ids, rows.ids), *((own[name], x) for name, x in rows.state.set_fields().items())]
        for to, x in pairs:
            to[:n].copy_(x)


Cuts = list[tuple[Tensor, Tensor]]  # hidden states where a stage begins: as computed, and as they go on, detached


@contextmanager
def _cut(module: nn.Module) -> Iterator[Cuts]:
    """Cut passes of ``module`` into stages where there are several processes, between the layers of its longest stack."""
    cuts: Cuts = []

    def cut(layer: nn.Module, args: tuple[Any, ...]) -> Any:
        if not args or not args[0].requires_grad:
            return None
        cuts.append((args[0], args[0].detach().requires_grad_()))
        return cuts[-1][1], *args[1:]

    layers: Any = max((part for part in module.modules() if isinstance(part, nn.ModuleList)), key=len, default=())
    places = {len(layers) * i // STAGES for i in range(1, STAGES)} if len(layers) > 1 and world_size() > 1 else ()
    hooks = [layers[i].register_forward_pre_hook(cut, prepend=True) for i in places]
    try:
        yield cuts
    finally:
        for hook in hooks:
            hook.remove()


def _differentiate(
    out: Tensor, grad: Tensor, cuts: Cuts, weights: dict[str, Tensor], flat_grad: Tensor,
    capture: Callable[[Any], AbstractContextManager[Any]],
) -> list[_Stage]:  # fmt: skip
    """The stages of the backward pass, from the last layers to the first; ``cuts`` is emptied.

    Paths around a cut are differentiated in each stage that they pass, and the gradients of a weight add up.
    """
    ends, starts = [out, *(x for x, _ in reversed(cuts))], [x for _, x in reversed(cuts)]
    cuts.clear()
    grads: list[Tensor | None] = [grad, *[None] * len(starts)]  # of the ends
    stages = []
    for i, end in enumerate(ends):
        graph, below = torch.cuda.CUDAGraph(), starts[i:]
        with capture(graph):
            found = torch.autograd.grad(end, [*below, *weights.values()], grads[i], len(below) > 0, allow_unused=True)
            for j, more in enumerate(found[: len(below)], i + 1):
                grads[j] = more if (before := grads[j]) is None or more is None else before + more
            own = {name: x for name, x in zip(weights, found[len(below) :], strict=True) if x is not None}
            flat = flat_grad[: sum(x.numel() for x in own.values())]
            if own:
                torch.cat([x.flatten() for x in own.values()], out=flat)
        stages.append(_Stage(graph, list(own), [x.shape for x in own.values()], flat))
    return stages


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
    """Replay a stage of the backward pass. The node of the first stage, which is made last, replays the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, graph: _Graph, stage: _Stage, pending: _Pending, later: Tensor | None, *parameters: Tensor
    ) -> Tensor:  # ``later``, of no elements, is of the stage that comes after this one
        ctx.graph, ctx.stage, ctx.pending, ctx.later = graph, stage, pending, later is not None
        if stage is not graph.stages[0]:
            return stage.flat_grad.new_empty(0)
        graph.forward.replay()
        return graph.out.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        graph, stage = ctx.graph, ctx.stage
        if ctx.pending is None:  # what the pass saved is gone
            raise RuntimeError("A replayed pass can be differentiated once. Use Execution(graphs=False) to do it again.")
        if stage is graph.stages[0]:
            if (rows := ctx.pending.rows) is not None:
                graph.load(rows)
                graph.forward.replay()
            graph.grad_out.copy_(grad)
        stage.graph.replay()
        ctx.pending = None
        copy = stage.flat_grad.clone()  # the next replay overwrites its own
        parts = copy.split([shape.numel() for shape in stage.shapes])
        later = copy.new_empty(0) if ctx.later else None
        return None, None, None, later, *map(_shaped, parts, stage.shapes)


def _shaped(flat: Tensor, shape: torch.Size) -> Tensor:
    return flat if len(shape) == 1 else flat.view(shape)  # most weights are vectors, and a view takes microseconds
