"""``chunk_tokens=auto``: as many tokens in a chunk as the memory that is free has room for."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tercet.contract import Ragged

SHARE = 0.5  # of free memory: the loss, and what the backward pass makes on its way, live beside a chunk
STATES = 3  # gradient and AdamW's two moments, as large as the weights; they come after the first step
SAMPLE = 512  # tokens that are tried
CACHED = 2048  # on a CPU: a larger chunk leaves its cache and is slower


def fitting(module: nn.Module, embed: Callable[[Ragged], Tensor], rows: Ragged) -> int:
    """Tokens of a chunk of ``rows`` whose activations ``embed`` can keep. The longest rows are tried: they need most."""
    order = torch.argsort(rows.length, descending=True)
    some = rows.take(order[: max(1, int((rows.length[order].cumsum(0) <= SAMPLE).sum()))])
    kept = kept_bytes(module, embed, some)
    weights = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
    device = some.ids.device
    room = SHARE * max(0, free(device) - STATES * weights)
    most = int(room / max(1.0, kept / len(some.ids)))
    return max(int(rows.length.max()), min(most, CACHED) if device.type == "cpu" else most)


def kept_bytes(module: nn.Module, embed: Callable[[Ragged], Tensor], rows: Ragged) -> int:
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


def free(device: torch.device) -> int:
    """Bytes that this process could still have."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    available = kernel_number(Path("/proc/meminfo"), "MemAvailable:", 1024)
    if available is None:  # not Linux
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    limit, used = (kernel_number(Path("/sys/fs/cgroup") / f"memory.{name}", "", 1) for name in ("max", "current"))
    return available if limit is None or used is None else min(available, limit - used)


def kernel_number(path: Path, name: str, unit: int) -> int | None:
    """The number after ``name`` in a file of the kernel; None where there is none."""
    if not path.is_file():
        return None
    found = [line.removeprefix(name).split()[0] for line in path.read_text().splitlines() if line.startswith(name)]
    return int(found[0]) * unit if found and found[0].isdigit() else None
