"""Texts to vectors outside training: each text once, sorted by length, shared between the processes."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tercet.contract import Ragged
from tercet.distributed import gather_rows, rank, world_size
from tercet.model.encoder import TextEncoder
from tercet.model.execution import PLAIN, Execution


class Encoding:
    """``texts -> (N, D)`` float32 on the CPU, the same in every process.

    Each text is encoded once in the life of this object: make a new one when the weights have changed. ``precision``
    makes the context of a forward pass, so that a model is measured in the precision that it is trained in.
    ``tokens`` is the budget of padded tokens in one pass: small ones are best on a CPU (they stay in its cache).
    """

    def __init__(
        self,
        encoder: TextEncoder,
        precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
        tokens: int | None = None,
        progress: str | None = None,
    ) -> None:
        self.encoder = encoder
        self.precision = precision
        self.tokens = tokens or (2048 if encoder.device.type == "cpu" else 65536)
        self.progress = progress
        self.seen: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Dropout off; the encoder's mode is put back afterwards."""
        new = sorted(set(texts) - self.seen.keys(), key=lambda text: (len(text), text))
        training = self.encoder.training
        self.encoder.eval()
        try:
            if new:
                self.seen.update(zip(new, self._rows(new), strict=True))
        finally:
            self.encoder.train(training)
        return torch.stack([self.seen[text] for text in texts])

    def _rows(self, texts: list[str]) -> Tensor:
        inputs = self.encoder.tokenize(texts)
        parts = inputs.rows()
        chunks = Execution("sorted", self.tokens, False).chunks(inputs.length)
        world = world_size()
        z = [torch.zeros(0, self.encoder.dim, device=self.encoder.device)]  # a process may have no chunk
        hidden = not self.progress or rank() > 0
        with tqdm(
            total=len(texts), desc=self.progress, unit=" sentences", disable=hidden, leave=False, mininterval=0.5
        ) as bar:
            for rows in chunks[rank() :: world]:
                chunk = Ragged(torch.cat([parts[i] for i in rows.tolist()]), inputs.length[rows])
                with self.precision():
                    out = PLAIN.run(self.encoder.embed, chunk.to(self.encoder.device), self.encoder.pad_id)
                z.append(out.float())
                bar.update(min(len(rows) * world, len(texts) - bar.n))
        order = torch.cat([rows for r in range(world) for rows in chunks[r::world]])
        return gather_rows(torch.cat(z)).cpu()[torch.argsort(order)]
