"""Cross-batch memory: keys of earlier steps as further negatives and positives."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tercet.errors import InputError
from tercet.types import Embeddings


@dataclass(frozen=True)
class Memory:
    """Settings of a cross-batch memory (Wang et al. 2020, arXiv:1912.06798) of the last ``size`` examples; 0 turns it off.

    It is filled from the first step on and used after ``warmup`` steps, when embeddings change slowly.

    >>> Memory(size=4096).build() is not None, Memory().build() is not None
    (True, False)
    """

    size: int = 0
    warmup: int = 1000

    def __post_init__(self) -> None:
        if self.size < 0 or self.warmup < 0:
            raise InputError(f"`size`={self.size}, `warmup`={self.warmup}: 0 or more.")

    def build(self) -> "MemoryKeys | None":
        """The memory, or None where its size is 0."""
        return MemoryKeys(self) if self.size > 0 else None


class MemoryKeys(nn.Module):
    """Detached keys of earlier global batches, the same in every process; usable with any loss."""

    def __init__(self, settings: Memory) -> None:
        super().__init__()
        self.settings = settings
        self.steps = 0
        self.stored: Embeddings | None = None

    def extend_and_push(self, keys: Embeddings) -> Embeddings:
        """``keys`` with the stored ones; then store ``keys``, unless they are not finite: such keys would stay."""
        self.to_device(keys.z.device)
        extended = self.extend(keys)
        if torch.isfinite(keys.z).all():
            self.push(keys)
        return extended

    def extend(self, keys: Embeddings) -> Embeddings:
        """``keys`` and the stored keys of other examples; an example's own earlier embedding is no key."""
        if self.stored is None or self.steps < self.settings.warmup:
            return keys
        return concat_embeddings(keys, self._others(self.stored, keys))

    def push(self, keys: Embeddings) -> None:
        """Store the newest ``size`` examples, each once."""
        new = Embeddings(keys.z.detach(), keys.example_id, keys.label, keys.position, keys.content_hash)
        if self.stored is not None:
            new = concat_embeddings(self._others(self.stored, keys), new)
        self.stored = new.select(slice(max(0, len(new) - self.settings.size), None))
        self.steps += 1

    @staticmethod
    def _others(stored: Embeddings, keys: Embeddings) -> Embeddings:
        return stored.select(~torch.isin(stored.example_id, keys.example_id))

    def get_extra_state(self) -> dict[str, Any]:
        """The stored keys, for checkpoints."""
        stored = self.stored
        return {"steps": self.steps} | ({} if stored is None else {name: getattr(stored, name).cpu() for name in FIELDS})

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what ``get_extra_state`` gave, also under the names of fields in checkpoints of version 1."""
        state = {OLD_FIELDS.get(name, name): value for name, value in state.items()}
        self.steps = state["steps"]
        self.stored = Embeddings(**{name: state[name] for name in FIELDS}) if "z" in state else None

    def to_device(self, device: torch.device) -> None:
        """Move the stored keys, which are no buffers, to the model's device."""
        if self.stored is not None and self.stored.z.device != device:
            self.stored = Embeddings(**{name: getattr(self.stored, name).to(device) for name in FIELDS})


FIELDS = ("z", "example_id", "label", "position", "content_hash")
OLD_FIELDS = {"uid": "example_id", "content": "content_hash"}


def concat_embeddings(first: Embeddings, second: Embeddings) -> Embeddings:
    """The examples of both."""
    z = torch.cat([first.z, second.z.to(first.z.dtype)], 1)
    example_id, label, position = (
        torch.cat([getattr(first, name), getattr(second, name)]) for name in ("example_id", "label", "position")
    )
    return Embeddings(z, example_id, label, position, torch.cat([first.content_hash, second.content_hash], 1))
