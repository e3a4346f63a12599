"""What a process holds, as Linux counts it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

MIB = 2**20


def status(field: str) -> int:
    """Bytes: VmRSS is held now, VmHWM was held at most, VmSize is addressed."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def alone(module: str, *arguments: object) -> Any:
    """What ``python -m module arguments`` prints last, read as JSON; None where the kernel ends it for want of memory."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == -9:  # the kernel's way to say it
        return None
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])
