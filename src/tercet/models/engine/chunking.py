"""How rows run through a network: in which order, in what chunks, recomputed or not; and the memory that chunks need."""

import ctypes
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tercet.errors import check_choice, require
from tercet.messages import warn_once
from tercet.types import TokenBatch, runs_on_cpu, send

Embed = Callable[[TokenBatch], Tensor]  # n rows to (n, ...)
Replayed = Callable[[TokenBatch], Tensor | None]  # the same, by a CUDA graph; None where that cannot be
LAYOUTS = ("auto", "packed", "sorted", "padded", "equal_length")
DROPOUTS = ("auto", "torch", "deterministic")

SHARE = 0.5  # of free memory for a chunk: the loss and the temporaries of the backward pass need room beside it
STATES = 3  # gradient and AdamW's two moments, each as large as the weights; allocated after the first step
SAMPLE = 512  # tokens of the forward pass that measures activations
CACHED = 3072  # tokens; on a CPU a larger chunk does not fit into the cache and is slower
GROWTH = 1.5  # the heap is trimmed when the process is this many times as large as after the last trim

_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # a function of glibc
_trimmed_size = 0


@dataclass(frozen=True)
class Execution:
    """Settings of a forward pass. They change speed and memory, not the result.

    ``layout`` of texts: ``packed`` concatenates rows and computes no padding; ``sorted`` orders rows by length, so that
    little of a chunk is padding; ``padded`` keeps the order; ``equal_length`` runs rows of one length at a time, for backbones
    whose states depend on padding. ``auto`` is the first of packed, sorted and equal_length that the backbone can.
    ``dropout``: ``deterministic`` makes masks a function of (seed, step, row, view, layer), the same for any number of
    processes and any chunks; ``torch`` is torch's own; ``auto`` is deterministic where that costs no more, on a CPU and with
    Triton's kernels on a GPU, if the backbone can pack. ``chunk_tokens``: the most tokens of one chunk of texts, padding
    included; ``chunk_rows``: its most rows, of texts or images; None is no limit. ``chunk_tokens="auto"`` is, under
    ``recompute``, what fits into free memory, measured on the first batch; else 3,072 on a CPU, which its cache holds, and no
    limit on a GPU.
    ``recompute``: save no activations and compute each chunk again in the backward pass, with the same dropout. This is
    GradCache (Gao et al. 2021, arXiv:2101.06983): the same gradient in the memory of one chunk. ``graphs``: on a GPU, replay
    the passes of packed rows of at most 128 tokens as CUDA graphs, which the host need not launch kernel by kernel; of chunks
    only where they are recomputed with dropout by seed.

    >>> execution = Execution(layout="sorted", chunk_tokens=8)
    >>> [chunk.tolist() for chunk in execution.chunks(torch.tensor([2, 7, 3, 4]))]
    [[1], [3, 2], [0]]
    """

    layout: str = "auto"
    dropout: str = "auto"
    chunk_tokens: int | Literal["auto"] | None = None
    chunk_rows: int | None = None
    recompute: bool = False
    graphs: bool = True

    def __post_init__(self) -> None:
        check_choice("layout", self.layout, LAYOUTS)
        check_choice("dropout", self.dropout, DROPOUTS)
        for name, value in (("chunk_tokens", self.chunk_tokens), ("chunk_rows", self.chunk_rows)):
            usable = value is None or (name, value) == ("chunk_tokens", "auto") or (not isinstance(value, str) and value >= 1)
            require(usable, f"`{name}`={value}: a number above 0, or null for no limit. `chunk_tokens` can be auto.")

    def unchunked(self) -> "Execution":
        """The same in one pass, for rows that are a chunk already."""
        return replace(self, chunk_tokens=None, chunk_rows=None, recompute=False, graphs=False)

    def fastest(self, device: torch.device) -> "Execution":
        """``chunk_tokens="auto"`` replaced where no memory has to be measured: where activations are kept, not recomputed."""
        if self.chunk_tokens != "auto" or self.recompute:
            return self
        return replace(self, chunk_tokens=CACHED if runs_on_cpu(device) else None)

    @property
    def in_one_pass(self) -> bool:
        """Whether all rows run at once."""
        return self.chunk_tokens is None and self.chunk_rows is None

    @property
    def can_replay(self) -> bool:
        """Whether passes may be replayed as CUDA graphs: of packed rows, all at once or recomputed."""
        return self.graphs and self.layout == "packed" and (self.in_one_pass or self.recompute)

    def chunks(self, lengths: Tensor) -> list[Tensor]:
        """``lengths (N,)`` to tensors of row indices, each row in one; a row above the limit is a chunk of its own."""
        if isinstance(self.chunk_tokens, str):
            raise RuntimeError("chunk_tokens='auto' has to be resolved first, by Encoder.execution_for.")
        order = torch.arange(len(lengths)) if self.layout == "padded" else torch.argsort(lengths, descending=True, stable=True)
        tokens, rows = self.chunk_tokens or float("inf"), self.chunk_rows or float("inf")
        cuts, start, longest, real = [], 0, 0, 0
        for i, n in enumerate(lengths[order].tolist()):
            longest, real = max(longest, n), real + n
            used = real if self.layout == "packed" else longest * (i + 1 - start)
            shorter = self.layout == "equal_length" and n < longest
            if i > start and (used > tokens or i - start >= rows or shorter):
                cuts.append(i)
                start, longest, real = i, n, n
        return list(order.tensor_split(cuts))

    def computed_tokens(self, lengths: Tensor) -> int:
        """How many tokens are computed for rows of these lengths, padding included."""
        if self.layout == "packed":
            return int(lengths.sum())
        return sum(len(rows) * int(lengths[rows].max()) for rows in self.chunks(lengths) if len(rows))

    def run(self, function: Embed, rows: TokenBatch, replay: Replayed | None = None) -> Tensor:
        """Apply ``n rows -> (n, ...)`` to all rows, in their order; ``replay`` does so where it can, and else gives None."""
        if self.layout == "packed" and self.in_one_pass and not runs_on_cpu(rows.ids.device):
            return self.run_parts(function, [rows], replay)  # only a CPU is faster with adjacent rows of equal length
        chunks = self.chunks(rows.lengths)
        done = self.run_parts(function, (rows.select(chunk) for chunk in chunks), replay)
        return done.index_select(0, *send([torch.argsort(torch.cat(chunks))], done.device))

    def run_parts(self, function: Callable[[Any], Tensor], parts: Iterable[Any], replay: Replayed | None = None) -> Tensor:
        """Apply ``function`` to each part and concatenate the results."""
        parts, graded = list(parts), torch.is_grad_enabled()
        recompute = self.recompute and graded

        def call(part: Any) -> Tensor:  # twice for a part that is recomputed: again in the backward pass
            if recompute:
                trim_heap()
            with _separate_casts() if graded and len(parts) > 1 else nullcontext():
                return function(part)

        def run(part: Any) -> Tensor:
            if replay and (replayed := replay(part)) is not None:
                return replayed
            return checkpoint(call, part, use_reentrant=False) if recompute else call(part)

        done = [run(part) for part in parts]
        return done[0] if len(done) == 1 else torch.cat(done)


@contextmanager
def _separate_casts() -> Iterator[None]:
    """Let autocast cast the weights for this pass alone.

    Where chunks share a cast their gradients are summed in half precision, in which the last of many chunks are lost.
    """
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


DEFAULT_EXECUTION = Execution()


class AutoChunks:
    """Resolves ``chunk_tokens="auto"``. Under ``recompute`` it is measured on the longest rows of the first batch and kept."""

    tokens: int | None = None

    def resolve(self, execution: Execution, module: nn.Module, embed: Embed, rows: TokenBatch) -> Execution:
        """``execution`` with a number of tokens, under ``recompute`` one whose activations fit into memory."""
        if execution.chunk_tokens == "auto":  # else the input may be images
            execution = execution.fastest(rows.ids.device)
        if execution.chunk_tokens != "auto":
            return execution
        if self.tokens is None:
            order, device = torch.argsort(rows.lengths, descending=True), rows.ids.device
            sample = rows.select(order[: max(1, int((rows.lengths[order].cumsum(0) <= SAMPLE).sum()))])
            activations = saved_activation_bytes(module, embed, sample)
            weights = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
            share = SHARE / 2 if execution.can_replay and not runs_on_cpu(device) else SHARE  # graphs keep what a chunk needs
            room = share * max(0, free_memory(device) - STATES * weights)
            most = int(room / max(1.0, activations / len(sample.ids)))
            self.tokens = max(int(rows.lengths.max()), min(most, CACHED) if device.type == "cpu" else most)
            warn_once(f"chunk_tokens=auto is {self.tokens:,} here.")
        return replace(execution, chunk_tokens=self.tokens)


def saved_activation_bytes(module: nn.Module, embed: Embed, rows: TokenBatch) -> int:
    """Bytes that autograd saves in one forward pass, without the weights. Random states are left unchanged."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    sizes: dict[int, int] = {}

    def record(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return x  # stays alive until the end, so that no other storage gets its address

    devices = [rows.ids.device] if rows.ids.is_cuda else []
    with torch.enable_grad(), torch.random.fork_rng(devices), torch.autograd.graph.saved_tensors_hooks(record, lambda x: x):
        embed(rows)
    return sum(sizes.values())


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still allocate."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available = _read_kernel_value("/proc/meminfo", "MemAvailable:", 1024) or memory // 2  # where it is not Linux
    limit, used = (_read_kernel_value(f"/sys/fs/cgroup/memory.{name}", "", 1) for name in ("max", "current"))
    return available if limit is None or used is None else min(available, limit - used)


def trim_heap(now: bool = False) -> None:
    """Return free memory to the system if this process has grown since the last call, or ``now``."""
    # Chunks differ in size and fragment the heap: glibc came to hold five times what a step needs. Trimming costs time, too.
    global _trimmed_size
    if _trim is not None and (now or resident_bytes() > GROWTH * _trimmed_size):
        _trim(0)
        _trimmed_size = resident_bytes()


def resident_bytes() -> int:
    """Resident memory of this process in bytes; 0 where the kernel does not report it."""
    return _read_kernel_value("/proc/self/status", "VmRSS:", 1024) or 0


def _read_kernel_value(path: str, name: str, unit: int) -> int | None:
    """The number after ``name`` in a file of /proc or /sys, times ``unit``; None if there is none."""
    lines = Path(path).read_text().splitlines() if Path(path).is_file() else []
    found = [line.removeprefix(name).split()[0] for line in lines if line.startswith(name)]
    return int(found[0]) * unit if found and found[0].isdigit() else None
