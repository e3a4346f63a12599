"""The encoder interface, and encoding outside training."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tercet.distributed.gather import gather_rows, rank, world_size
from tercet.models.text import Encoder
from tercet.types import Inputs, Item, TokenBatch


class CachedEncoder:
    """``texts or images -> (N, D)`` float32 on the CPU, the same in every process.

    Each item is encoded once in the life of this object: make a new one when the weights have changed. ``precision``
    makes the context of a forward pass, so that a model is measured in the precision that it is trained in.
    ``tokens`` is the budget of tokens in one pass, ``images`` that of images: small ones are best on a CPU (they
    stay in its cache).
    """

    def __init__(
        self,
        encoder: Encoder,
        precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
        tokens: int | None = None,
        images: int | None = None,
        progress: str | None = None,
    ) -> None:
        on_cpu = encoder.device.type == "cpu"
        self.encoder = encoder
        self.precision = precision
        self.tokens = tokens or (2048 if on_cpu else 65536)
        self.images = images or (32 if on_cpu else 256)
        self.progress = progress
        self.cache: dict[Item, Tensor] = {}

    @torch.no_grad()
    def __call__(self, items: Sequence[Item]) -> Tensor:
        """Dropout off; the encoder's mode is put back afterwards."""
        new = sorted(set(items) - self.cache.keys(), key=lambda item: (len(item), item))
        training = self.encoder.training
        self.encoder.eval()
        try:
            if new:
                self.cache.update(zip(new, self._rows(new), strict=True))
        finally:
            self.encoder.train(training)
        return torch.stack([self.cache[item] for item in items])

    @property
    def num_outputs(self) -> int:
        """How many vectors stand side by side in a row: 2 where the encoder has Quick-Thoughts' f and g."""
        training = self.encoder.training
        sides = self.encoder.eval().num_outputs  # a head may be for training only
        self.encoder.train(training)
        return sides

    def _rows(self, items: list[Item]) -> Tensor:
        chunks, load = self._images(items) if self.encoder.kind == "image" else self._texts(items)
        world = world_size()
        z = [torch.zeros(0, self.encoder.dim, device=self.encoder.device)]  # a process may have no chunk
        hidden = not self.progress or rank() > 0
        unit = " images" if self.encoder.kind == "image" else " sentences"
        with tqdm(total=len(items), desc=self.progress, unit=unit, disable=hidden, leave=False, mininterval=0.5) as bar:
            for rows in chunks[rank() :: world]:
                inputs = load(rows).to(self.encoder.device)
                with self.precision():
                    z.append(self.encoder.run(inputs, self.encoder.execution.unchunked()).float())
                bar.update(min(len(rows) * world, len(items) - bar.n))
        order = torch.cat([rows for r in range(world) for rows in chunks[r::world]])
        return gather_rows(torch.cat(z)).cpu()[torch.argsort(order)]

    def _texts(self, items: list[Item]) -> tuple[list[Tensor], Callable[[Tensor], Inputs]]:
        inputs = self.encoder.prepare(items)
        assert isinstance(inputs, TokenBatch)
        plan = replace(self.encoder.execution, chunk_tokens=self.tokens, chunk_rows=None)
        return plan.chunks(inputs.lengths), inputs.select

    def _images(self, items: list[Item]) -> tuple[list[Tensor], Callable[[Tensor], Inputs]]:
        # Decoded as they are needed: all pixels at once would not fit.
        chunks = list(torch.arange(len(items)).split(self.images))
        return chunks, lambda rows: self.encoder.prepare([items[i] for i in rows.tolist()])


class ConcatEncoder:
    """Several models' vectors as one, ``(N, sum of D)``: Quick-Thoughts' combined and multi-channel models, at test time.

    Where all have two sides, those stay apart: [f1; f2; g1; g2].
    """

    def __init__(self, members: Sequence[CachedEncoder]) -> None:
        self.members = members

    @property
    def num_outputs(self) -> int:
        """That of all members, 1 where they differ."""
        sides = {member.num_outputs for member in self.members}
        return sides.pop() if len(sides) == 1 else 1

    def __call__(self, items: Sequence[Item]) -> Tensor:
        """Each member encodes an item once."""
        sides = self.num_outputs
        parts = [member(items).chunk(sides, 1) for member in self.members]
        return torch.cat([part[side] for side in range(sides) for part in parts], 1)
