"""Keys of earlier steps: negatives and positives beyond the batch."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tercet.errors import InputError
from tercet.types import Embeddings


@dataclass(frozen=True)
class Memory:
    """Settings of a cross-batch memory (Wang et al. 2020, arXiv:1912.06798): the last ``size`` examples; 0 is none.

    It is filled from the first step on and used after ``warmup`` of them, once embeddings move slowly.
    """

    size: int
    warmup: int

    def __post_init__(self) -> None:
        if self.size < 0 or self.warmup < 0:
            raise InputError(f"objective.memory.size={self.size}, warmup={self.warmup}: 0 or more.")

    def build(self) -> "MemoryKeys | None":
        """The memory, or None where its size is 0."""
        return MemoryKeys(self) if self.size > 0 else None


class MemoryKeys(nn.Module):
    """More keys, detached: any loss takes them. They are the global batch's, so that every process holds the same."""

    def __init__(self, settings: Memory) -> None:
        super().__init__()
        self.settings = settings
        self.steps = 0
        self.stored: Embeddings | None = None

    def extend(self, keys: Embeddings) -> Embeddings:
        """``keys`` and what is remembered of other examples; an example's own past is neither key nor negative."""
        if self.stored is None or self.steps < self.settings.warmup:
            return keys
        others = self.stored.select(~torch.isin(self.stored.example_id, keys.example_id))
        return concat_embeddings(keys, others)

    def push(self, keys: Embeddings) -> None:
        """Remember the newest ``size`` examples, each once."""
        size = self.settings.size
        fresh = Embeddings(keys.z.detach(), keys.example_id, keys.label, keys.position, keys.content_hash)
        if self.stored is not None:
            fresh = concat_embeddings(self.stored.select(~torch.isin(self.stored.example_id, keys.example_id)), fresh)
        self.stored = fresh.select(slice(max(0, len(fresh) - size), None))
        self.steps += 1

    def get_extra_state(self) -> dict[str, Any]:
        """For checkpoints: a run that goes on remembers."""
        kept = self.stored
        fields = {} if kept is None else {name: getattr(kept, name).cpu() for name in FIELDS}
        return {"steps": self.steps, **fields}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """The inverse."""
        self.steps = state["steps"]
        self.stored = Embeddings(**{name: state[name] for name in FIELDS}) if "z" in state else None

    def to_device(self, device: torch.device) -> None:
        """After loading, the rows follow the model."""
        if self.stored is not None and self.stored.z.device != device:
            self.stored = Embeddings(**{name: getattr(self.stored, name).to(device) for name in FIELDS})


FIELDS = ("z", "example_id", "label", "position", "content_hash")


def concat_embeddings(first: Embeddings, second: Embeddings) -> Embeddings:
    """The examples of both."""
    z = torch.cat([first.z, second.z.to(first.z.dtype)], 1)
    uid, label, position = (
        torch.cat([getattr(first, name), getattr(second, name)]) for name in ("example_id", "label", "position")
    )
    return Embeddings(z, uid, label, position, torch.cat([first.content_hash, second.content_hash], 1))
