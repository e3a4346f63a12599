"""``encode -> metrics``: an evaluator sees a function, whatever model is behind it."""

from tercet.evaluation.geometry import Geometry, alignment, uniformity
from tercet.evaluation.retrieval import Retrieval
from tercet.evaluation.sts import STS, table
from tercet.evaluation.together import Together

__all__ = ["STS", "Geometry", "Retrieval", "Together", "alignment", "table", "uniformity"]
