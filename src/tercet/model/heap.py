"""Memory that was freed and that malloc still holds, given back before it outgrows what is used."""

import ctypes
import os
from pathlib import Path

GROWN = 1.5  # times what was left the last time
STATM = Path("/proc/self/statm")

_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; elsewhere there is nothing to do
_left = 0


def tidy(now: bool = False) -> None:
    """Give back what is free, where this process has grown since, or ``now``.

    Chunks of rows differ in size, and each leaves holes that the next does not fit: glibc came to hold five times what a
    step needs. Giving back costs, since what is given back must be asked for again.
    """
    global _left
    if _trim is None or not STATM.is_file():
        return
    if now or held() > GROWN * _left:
        _trim(0)
        _left = held()


def held() -> int:
    """Bytes that this process has in memory."""
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
