"""FaceNet: A Unified Embedding for Face Recognition and Clustering (Schroff et al. 2015, arXiv:1503.03832)."""

from typing import ClassVar

from tercet.objective.contrastive import Contrastive


class FaceNet(Contrastive):
    """Rows of equal label are drawn together, all others apart: images or texts, by triplets (section 3).

    One labelled column is the paper's case. Two columns are positives of each other, with or without labels, and a
    third holds negatives for everyone (NLI triplets).
    """

    columns: ClassVar[tuple[int, int]] = (1, 3)
    positives: ClassVar[str] = "label"
