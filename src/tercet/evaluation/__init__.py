"""``encode -> metrics``: an evaluator sees a function, whatever model is behind it."""

from tercet.evaluation.clustering import Clustering
from tercet.evaluation.geometry import Geometry, alignment, uniformity
from tercet.evaluation.labelled import Labelled
from tercet.evaluation.neighbours import Neighbours
from tercet.evaluation.retrieval import Retrieval
from tercet.evaluation.sts import STS, table
from tercet.evaluation.together import Together
from tercet.evaluation.transfer import Transfer
from tercet.evaluation.verification import Verification

__all__ = [
    "STS",
    "Clustering",
    "Geometry",
    "Labelled",
    "Neighbours",
    "Retrieval",
    "Together",
    "Transfer",
    "Verification",
    "alignment",
    "table",
    "uniformity",
]
