"""Weights that are read from files: all of them are found, or the error names those that are not."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tercet.errors import require

WRAPPERS = r"^((_orig_mod|module)\.)+"  # torch.compile and DistributedDataParallel put these before the names of weights


def check_found(what: str, missing: Iterable[str], unknown: Iterable[str] = ()) -> None:
    """Raise ``InputError`` that names weights which ``what`` lacks, or has beyond those that the model has."""
    for names, fault in ((sorted(missing), "it lacks weights of the model"), (sorted(unknown), "it holds other weights")):
        listed = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        require(not names, f"{what}: {fault}: {listed}. Use a complete file; nothing is drawn at random in their place.")


def check_finite(what: str, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Raise ``InputError`` that names those weights of ``what`` that hold NaN or infinite values."""
    bad = [name for name, weight in weights if weight.is_floating_point() and not bool(weight.isfinite().all())]
    listed = ", ".join(bad[:4]) + (f" and {len(bad) - 4} more" if len(bad) > 4 else "")
    require(not bad, f"{what}: weights hold NaN or infinite values: {listed}. Use weights from before they diverged.")


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], what: str) -> None:
    """Copy ``weights``, all of those that the module has, without the prefixes of wrappers; ``InputError`` names ``what``."""
    weights = {re.sub(WRAPPERS, "", name): weight for name, weight in weights.items()}
    own = module.state_dict()
    check_found(what, own.keys() - weights.keys(), weights.keys() - own.keys())
    for name, weight in weights.items():
        shapes = f"{name} has the shape {tuple(weight.shape)}, and {tuple(own[name].shape)} in the model"
        require(weight.shape == own[name].shape, f"{what}: {shapes}.")
    check_finite(what, weights.items())
    module.load_state_dict(weights)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file: safetensors, or torch's format, read with ``weights_only=True``."""
    if path.suffix == ".safetensors":
        return load_file(path)
    return cast(dict[str, Tensor], torch.load(path, map_location="cpu", weights_only=True))
