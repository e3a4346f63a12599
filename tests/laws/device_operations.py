"""Law 9's instrument: counts the operations that a device runs, and refuses those for which the host would wait for it."""

import inspect
import sys
from collections import Counter
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tercet.models.engine.replay import Replay

# Operations that change how memory is looked at and launch nothing.
VIEWS = frozenset(
    ("aten.view.default", "aten.view.dtype", "aten._unsafe_view.default", "aten._reshape_alias.default", "aten.alias.default",
     "aten.as_strided.default", "aten.detach.default", "aten.t.default", "aten.transpose.int", "aten.permute.default",
     "aten.expand.default", "aten.squeeze.default", "aten.squeeze.dim", "aten.squeeze.dims", "aten.unsqueeze.default",
     "aten.select.int", "aten.slice.Tensor", "aten.split.Tensor", "aten.split_with_sizes.default", "aten.unbind.int",
     "aten.unflatten.int", "aten.diagonal.default", "aten.unfold.default")
)  # fmt: skip
# Operations that read from the device, or whose result has a shape that depends on data, which is then read.
READS = frozenset(
    ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "argwhere", "masked_select", "bincount", "unique_dim",
     "unique_consecutive", "unique_dim_consecutive", "_unique", "_unique2", "lift_fresh")  # the last: copied from the host
)  # fmt: skip
INDEXING = frozenset(("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"))


class HostWaitsError(AssertionError):
    """An operation that would make the host wait for the device, or copy what it has just made there."""


class DeviceOperations(TorchDispatchMode):
    """Count operations by name in ``counts``, views left out; raise ``HostWaitsError`` where the host would wait.

    The host's own tensors are not told apart: what is done to them counts, and is refused, as well.

    >>> with DeviceOperations() as operations:
    ...     _ = torch.ones(3).sum()
    >>> operations.total
    2
    """

    def __init__(self, refuse=True):
        super().__init__()
        self.counts, self.waits, self.refuse, self.active = Counter(), Counter(), refuse, True

    @property
    def total(self):
        return self.counts.total()

    @contextmanager
    def paused(self):
        """What the host does with tensors of its own."""
        before, self.active = self.active, False
        try:
            yield
        finally:
            self.active = before

    def pause_in(self, monkeypatch, owner, name):
        """Let a function of ``owner`` be work of the host."""
        real = inspect.getattr_static(owner, name)
        function = real.__func__ if isinstance(real, staticmethod) else real

        def paused(*args, **kwargs):
            with self.paused():
                return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, staticmethod(paused) if isinstance(real, staticmethod) else paused)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not self.active:
            return func(*args, **kwargs)
        if waits(func, args, kwargs):
            self.waits[str(func)] += 1
            if self.refuse:
                raise HostWaitsError(f"the host waits for the device: {func}")
        if str(func) not in VIEWS:
            self.counts[str(func)] += 1
        return func(*args, **kwargs)


def waits(func, args, kwargs):
    """Whether an operation makes the host wait for the device."""
    name = func._schema.name.removeprefix("aten::")
    if name in INDEXING:
        return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    if name == "repeat_interleave":
        return func is torch.ops.aten.repeat_interleave.Tensor and kwargs.get("output_size") is None
    return name in READS


def do_as_on_a_gpu(monkeypatch):
    """Let all modules of tercet that are loaded do on a CPU what they do on a GPU, CUDA graphs aside (``recorded_graphs``)."""
    for name, module in list(sys.modules.items()):
        if name.startswith("tercet.") and hasattr(module, "runs_on_cpu"):
            monkeypatch.setattr(module, "runs_on_cpu", lambda device: False)
    monkeypatch.setattr(Replay, "can_run", lambda *_: False)
