"""Quick-Thoughts: An efficient framework for learning sentence representations (Logeswaran and Lee 2018, arXiv:1803.02893)."""

from typing import ClassVar

from tercet.contract import Batch, Embedded
from tercet.objective.contrastive import Contrastive


class QuickThoughts(Contrastive):
    """f of a sentence finds g of its neighbours (section 3).

    f and g are two towers (``model=towers``), two heads on one trunk (``model.head.kind=two_linear``), or one encoder;
    the embedding of a sentence is [f; g]. One column, whose rows come in order: ``label`` names the document,
    ``position`` the place in it.
    """

    columns: ClassVar[tuple[int, int]] = (1, 1)
    positives: ClassVar[str] = "position"

    def embed(self, batch: Batch) -> Embedded:
        """``z (2, N, D)``: f and g; the same twice of an encoder that has one side."""
        sides = self.encoder.sides
        z = self.encoder(batch.views[0]).unflatten(-1, (sides, -1)).movedim(1, 0)
        content = batch.content.expand(2, -1)
        return Embedded(z.expand(2, -1, -1), batch.uid, batch.label, batch.position, content)
