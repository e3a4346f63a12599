"""Memory that was freed and that malloc still holds, given back before it outgrows what is used."""

import ctypes
from pathlib import Path

from tercet.model.fitting import kernel_number

GROWN = 1.5  # times what was left the last time

_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; elsewhere there is nothing to do
_left = 0


def tidy(now: bool = False) -> None:
    """Give back what is free, where this process has grown since, or ``now``.

    Chunks of rows differ in size, and each leaves holes that the next does not fit: glibc came to hold five times what a
    step needs. Giving back costs, since what is given back must be asked for again.
    """
    global _left
    size = held()
    if _trim is None or size is None:
        return
    if now or size > GROWN * _left:
        _trim(0)
        _left = held() or 0


def held() -> int | None:
    """Bytes that this process has in memory; None where the kernel does not say."""
    return kernel_number(Path("/proc/self/status"), "VmRSS:", 1024)
