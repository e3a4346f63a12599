"""Where relative paths of data and models start."""

import os
from pathlib import Path


def locate(path: str) -> Path:
    """The path itself if it exists, else the same path under ``TERCET_DATA`` (whether it exists there or not)."""
    here = Path(path).expanduser()
    root = os.environ.get("TERCET_DATA")
    return here if here.is_absolute() or here.exists() or not root else Path(root) / here
