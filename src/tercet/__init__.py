"""Tercet: contrastive representation learning (FaceNet, SimCSE, Quick-Thoughts).

Packages are imported on first use: ``import tercet`` alone loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tercet import data, distributed, evaluation, losses, models, search, training, views
    from tercet.models.folder import load

__version__ = "0.2.0"
__all__ = ["__version__", "data", "distributed", "evaluation", "load", "losses", "models", "search", "training", "views"]


def __getattr__(name: str) -> Any:
    if name == "load":
        return import_module("tercet.models.folder").load
    if name in __all__:
        return import_module(f"tercet.{name}")
    raise AttributeError(f"module 'tercet' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
