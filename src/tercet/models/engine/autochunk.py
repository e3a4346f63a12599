"""Chunk sizes that fit into free memory, and returning freed memory to the system."""

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tercet.types import TokenBatch

SHARE = 0.5  # of free memory: the loss, and what the backward pass makes on its way, live beside a chunk
STATES = 3  # gradient and AdamW's two moments, as large as the weights; they come after the first step
SAMPLE = 512  # tokens that are tried
CACHED = 2048  # on a CPU: a larger chunk leaves its cache and is slower


def max_chunk_tokens(module: nn.Module, embed: Callable[[TokenBatch], Tensor], rows: TokenBatch) -> int:
    """Tokens of a chunk of ``rows`` whose activations ``embed`` can keep. The longest rows are tried: they need most."""
    order = torch.argsort(rows.lengths, descending=True)
    some = rows.select(order[: max(1, int((rows.lengths[order].cumsum(0) <= SAMPLE).sum()))])
    kept = saved_activation_bytes(module, embed, some)
    weights = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
    device = some.ids.device
    room = SHARE * max(0, free_memory(device) - STATES * weights)
    most = int(room / max(1.0, kept / len(some.ids)))
    return max(int(rows.lengths.max()), min(most, CACHED) if device.type == "cpu" else most)


def saved_activation_bytes(module: nn.Module, embed: Callable[[TokenBatch], Tensor], rows: TokenBatch) -> int:
    """What autograd keeps of one forward pass, weights not counted; the random state is as before."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    sizes: dict[int, int] = {}

    def keep(x: Tensor) -> Any:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return x  # held until the end: a storage that is let go would lend its address to another

    devices = [rows.ids.device] if rows.ids.is_cuda else []
    with torch.enable_grad(), torch.random.fork_rng(devices):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            z = embed(rows)
        del z
    return sum(sizes.values())


def free_memory(device: torch.device) -> int:
    """Bytes that this process could still have."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    available = read_kernel_value(Path("/proc/meminfo"), "MemAvailable:", 1024)
    if available is None:  # not Linux
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    limit, used = (read_kernel_value(Path("/sys/fs/cgroup") / f"memory.{name}", "", 1) for name in ("max", "current"))
    return available if limit is None or used is None else min(available, limit - used)


def read_kernel_value(path: Path, name: str, unit: int) -> int | None:
    """The number after ``name`` in a file of the kernel; None where there is none."""
    if not path.is_file():
        return None
    found = [line.removeprefix(name).split()[0] for line in path.read_text().splitlines() if line.startswith(name)]
    return int(found[0]) * unit if found and found[0].isdigit() else None


GROWN = 1.5  # times what was left the last time

_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; elsewhere there is nothing to do
_left = 0


def trim_heap(now: bool = False) -> None:
    """Give back what is free, where this process has grown since, or ``now``.

    Chunks of rows differ in size, and each leaves holes that the next does not fit: glibc came to hold five times what a
    step needs. Giving back costs, since what is given back must be asked for again.
    """
    global _left
    size = resident_bytes()
    if _trim is None or size is None:
        return
    if now or size > GROWN * _left:
        _trim(0)
        _left = resident_bytes() or 0


def resident_bytes() -> int | None:
    """Bytes that this process has in memory; None where the kernel does not say."""
    return read_kernel_value(Path("/proc/self/status"), "VmRSS:", 1024)
