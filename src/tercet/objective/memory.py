"""Keys of earlier steps: negatives and positives beyond the batch."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tercet.contract import Embedded
from tercet.error import InputError


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
        self.kept: Embedded | None = None

    def extend(self, keys: Embedded) -> Embedded:
        """``keys`` and what is remembered of other examples; an example's own past is neither key nor negative."""
        if self.kept is None or self.steps < self.settings.warmup:
            return keys
        others = self.kept.rows(~torch.isin(self.kept.uid, keys.uid))
        return joined(keys, others)

    def push(self, keys: Embedded) -> None:
        """Remember the newest ``size`` examples, each once."""
        size = self.settings.size
        fresh = Embedded(keys.z.detach(), keys.uid, keys.label, keys.position, keys.content)
        if self.kept is not None:
            fresh = joined(self.kept.rows(~torch.isin(self.kept.uid, keys.uid)), fresh)
        self.kept = fresh.rows(slice(max(0, len(fresh) - size), None))
        self.steps += 1

    def get_extra_state(self) -> dict[str, Any]:
        """For checkpoints: a run that goes on remembers."""
        kept = self.kept
        fields = {} if kept is None else {name: getattr(kept, name).cpu() for name in FIELDS}
        return {"steps": self.steps, **fields}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """The inverse."""
        self.steps = state["steps"]
        self.kept = Embedded(**{name: state[name] for name in FIELDS}) if "z" in state else None

    def to_device(self, device: torch.device) -> None:
        """After loading, the rows follow the model."""
        if self.kept is not None and self.kept.z.device != device:
            self.kept = Embedded(**{name: getattr(self.kept, name).to(device) for name in FIELDS})


FIELDS = ("z", "uid", "label", "position", "content")


def joined(first: Embedded, second: Embedded) -> Embedded:
    """The examples of both."""
    z = torch.cat([first.z, second.z.to(first.z.dtype)], 1)
    uid, label, position = (
        torch.cat([getattr(first, name), getattr(second, name)]) for name in ("uid", "label", "position")
    )
    return Embedded(z, uid, label, position, torch.cat([first.content, second.content], 1))
