"""Chunk sizes that fit into free memory, and returning freed memory to the system."""

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tercet.types import TokenBatch

SHARE = 0.5  # of free memory: the loss and the temporaries of the backward pass need room beside a chunk
STATES = 3  # gradient and AdamW's two moments, each as large as the weights; allocated after the first step
SAMPLE = 512  # tokens of the trial forward pass
CACHED = 2048  # tokens; on a CPU a larger chunk does not fit into the cache and is slower


def max_chunk_tokens(module: nn.Module, embed: Callable[[TokenBatch], Tensor], rows: TokenBatch) -> int:
    """Number of tokens whose activations under ``embed`` fit into memory, measured on the longest of ``rows``."""
    order = torch.argsort(rows.lengths, descending=True)
    sample = rows.select(order[: max(1, int((rows.lengths[order].cumsum(0) <= SAMPLE).sum()))])
    activations = saved_activation_bytes(module, embed, sample)
    weights = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
    device = sample.ids.device
    room = SHARE * max(0, free_memory(device) - STATES * weights)
    most = int(room / max(1.0, activations / len(sample.ids)))
    return max(int(rows.lengths.max()), min(most, CACHED) if device.type == "cpu" else most)


def saved_activation_bytes(module: nn.Module, embed: Callable[[TokenBatch], Tensor], rows: TokenBatch) -> int:
    """Bytes that autograd saves in one forward pass, without the weights. Random states are left unchanged."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    sizes: dict[int, int] = {}

    def record(x: Tensor) -> Any:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return x  # stays alive until the end, so that no other storage gets its address

    devices = [rows.ids.device] if rows.ids.is_cuda else []
    with torch.enable_grad(), torch.random.fork_rng(devices):
        with torch.autograd.graph.saved_tensors_hooks(record, lambda x: x):
            z = embed(rows)
        del z
    return sum(sizes.values())


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still allocate."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    available = read_kernel_value(Path("/proc/meminfo"), "MemAvailable:", 1024)
    if available is None:  # not Linux
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    limit, used = (read_kernel_value(Path("/sys/fs/cgroup") / f"memory.{name}", "", 1) for name in ("max", "current"))
    return available if limit is None or used is None else min(available, limit - used)


def read_kernel_value(path: Path, name: str, unit: int) -> int | None:
    """The number after ``name`` in a file of /proc or /sys, times ``unit``; None if there is none."""
    if not path.is_file():
        return None
    found = [line.removeprefix(name).split()[0] for line in path.read_text().splitlines() if line.startswith(name)]
    return int(found[0]) * unit if found and found[0].isdigit() else None


GROWTH = 1.5  # trim when the process is this many times as large as after the last trim

_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # a function of glibc
_trimmed_size = 0


def trim_heap(now: bool = False) -> None:
    """Return free memory to the system if this process has grown since the last call, or ``now``.

    Chunks of rows differ in size and fragment the heap: glibc came to hold five times what a step needs. Trimming costs
    time, as returned memory has to be requested again.
    """
    global _trimmed_size
    size = resident_bytes()
    if _trim is None or size is None:
        return
    if now or size > GROWTH * _trimmed_size:
        _trim(0)
        _trimmed_size = resident_bytes() or 0


def resident_bytes() -> int | None:
    """Resident memory of this process in bytes; None where the kernel does not report it."""
    return read_kernel_value(Path("/proc/self/status"), "VmRSS:", 1024)
