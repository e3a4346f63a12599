"""From configuration to objects."""

from typing import Any

from hydra.utils import instantiate


def build(node: Any, **extra: Any) -> Any:
    """Hydra's ``instantiate``, with plain lists and dicts inside: OmegaConf would take our dataclasses for configuration."""
    return instantiate(node, _convert_="all", **extra)
