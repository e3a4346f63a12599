"""CUDA graphs on a CPU: operations are recorded, and run again on the same memory, as a GPU does it."""

from contextlib import nullcontext
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tercet.models.engine import triton_kernels as kernels
from tercet.models.engine.deterministic_dropout import apply_dropout
from tercet.models.engine.replay import Replay
from tercet.rng import derive_seed
from tests.laws.device_operations import HostWaitsError, do_as_on_a_gpu, waits

CAN_RUN = Replay.can_run


class RecordedGraph(TorchDispatchMode):
    """In place of ``torch.cuda.CUDAGraph``: records operations while it is entered, and repeats them in ``replay``.

    ``replays`` counts those of all graphs.
    """

    replays = 0

    def __init__(self):
        super().__init__()
        self.steps = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if waits(func, args, kwargs or {}):
            raise HostWaitsError(f"the host waits for the device in a capture: {func}")
        out = func(*args, **(kwargs or {}))
        self.steps.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self):
        RecordedGraph.replays += 1
        with torch.autocast("cpu", enabled=False):  # what it casts is among the operations
            for func, args, kwargs, before in self.steps:
                after = func(*args, **kwargs)
                for old, new in zip(_tensors(before), _tensors(after), strict=True):
                    if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():  # else a view, or in place
                        old.copy_(new)


def _tensors(out):
    return [x for x in (out if isinstance(out, tuple | list) else [out]) if isinstance(x, torch.Tensor)]


def attention(
    q, k, v, starts, lengths, longest, scale=None, p=0.0, seed=None, attend=None, number=None, window=None, first_only=False
):
    """What the kernel of ``triton_kernels`` computes, by operations whose shapes do not depend on the rows."""
    n, tokens, place = len(starts), len(k), torch.arange(longest)
    at = (starts[:, None] + place).clamp(max=tokens - 1)
    row = torch.arange(n) if first_only else torch.searchsorted(starts + lengths, torch.arange(tokens), right=True)
    own = row.clamp(max=n - 1)  # for tokens of no row, which get zeros at the end
    position = torch.arange(len(q)) - (torch.arange(n) if first_only else starts[own])
    seen = place < lengths[own, None]
    if attend is not None:
        seen = seen & attend[at[own]]
    if window is not None:
        seen = seen & ((position[:, None] - place).abs() < window)
    scores = torch.einsum("thd,tlhd->thl", q, k[at[own]]) * (scale or q.shape[-1] ** -0.5)
    share = scores.masked_fill(~seen[:, None], torch.finfo(scores.dtype).min).softmax(-1)
    if p:
        seed = seed if number is None else derive_seed(seed, number)
        share = apply_dropout(share, p, derive_seed(seed[:, None], torch.arange(q.shape[1])))
    return torch.einsum("thl,tlhd->thd", share, v[at[own]]) * (row < n)[:, None, None]


def replay_on_a_cpu(monkeypatch):
    """Let passes of the encoders be captured and replayed, with attention and dropout in place of Triton's kernels."""
    do_as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(Replay, "can_run", CAN_RUN)
    stream = SimpleNamespace(wait_stream=lambda other: None)
    stand_ins = {
        "CUDAGraph": RecordedGraph, "graph": lambda graph, **_: graph, "graph_pool_handle": lambda: None,
        "Stream": lambda device: stream, "current_stream": lambda device: stream, "stream": lambda _: nullcontext(),
        "get_sync_debug_mode": lambda: 0, "set_sync_debug_mode": lambda mode: None,
    }  # fmt: skip
    for name, value in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(kernels, "available", lambda device, longest=1, d=1: longest <= kernels.LONGEST)
    monkeypatch.setattr(kernels, "short_attention", attention)
    monkeypatch.setattr(kernels, "seeded_dropout", lambda x, p, seed, number: apply_dropout(x, p, derive_seed(seed, number)))
