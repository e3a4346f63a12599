"""Texts to vectors outside training: each text once, sorted by length, shared between the processes."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from tqdm import tqdm

from tercet.contract import Ragged
from tercet.distributed import gather_rows, rank, world_size
from tercet.model.encoder import TextEncoder
from tercet.model.execution import Execution

_PLAN = Execution(order="given", chunk_tokens=None, recompute=False)


class Encoding:
    """``texts -> (N, D)`` float32 on the CPU, in the same order in every process.

    ``tokens`` is the budget of padded tokens in one forward pass: small ones are best on a CPU (they stay in its
    cache), large ones on a GPU. ``precision`` is entered around each forward pass, so that a model is measured in the
    precision that it is trained in.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        precision: AbstractContextManager[object] | None = None,
        tokens: int | None = None,
        progress: str | None = None,
    ) -> None:
        self.encoder = encoder
        self.precision = precision or nullcontext()
        self.tokens = tokens or (2048 if encoder.device.type == "cpu" else 65536)
        self.progress = progress

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Dropout off; the encoder's mode is put back afterwards."""
        unique = sorted(set(texts), key=lambda text: (len(text), text))
        place = {text: i for i, text in enumerate(unique)}
        training = self.encoder.training
        self.encoder.eval()
        try:
            z = self._rows(unique)
        finally:
            self.encoder.train(training)
        return z[torch.tensor([place[text] for text in texts], dtype=torch.long)]

    def _rows(self, texts: list[str]) -> Tensor:
        inputs = self.encoder.tokenize(texts)
        parts = inputs.rows()
        chunks = Execution("sorted", self.tokens, False).chunks(inputs.length)
        own = chunks[rank() :: world_size()]
        bar = tqdm(
            total=len(texts),
            desc=self.progress,
            unit=" sentences",
            disable=not self.progress or rank() > 0,
            leave=False,
        )
        z = []
        for rows in own:
            chunk = Ragged(torch.cat([parts[i] for i in rows.tolist()]), inputs.length[rows])
            with self.precision:
                out = _PLAN.run(self.encoder._embed, chunk.to(self.encoder.device), self.encoder.pad_id)
            z.append(out.float())
            bar.update(len(rows) * world_size())
        bar.close()
        mine = torch.cat(z) if z else torch.zeros(0, self.encoder.dim, device=self.encoder.device)
        order = torch.cat([rows for r in range(world_size()) for rows in chunks[r :: world_size()]])
        return gather_rows(mine).cpu()[torch.argsort(order)]
