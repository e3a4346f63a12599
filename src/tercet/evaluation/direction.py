"""Which of two values of a metric is better: evaluators declare the names of those that are better when smaller."""

from collections.abc import Iterable

from tercet.evaluation.adjacent_sentences import AdjacentSentences
from tercet.evaluation.alignment_uniformity import AlignmentUniformity
from tercet.evaluation.clustering import Clustering
from tercet.evaluation.nearest_neighbor import NearestNeighbor
from tercet.evaluation.retrieval import Retrieval
from tercet.evaluation.sts import STS
from tercet.evaluation.transfer import Transfer
from tercet.evaluation.verification import Verification

EVALUATORS = (AdjacentSentences, AlignmentUniformity, Clustering, NearestNeighbor, Retrieval, STS, Transfer, Verification)
TRAINING = frozenset({"loss", "mlm_loss", "perplexity", "alignment", "uniformity"})  # logged by every objective
SMALLER_IS_BETTER = TRAINING.union(*(kind.smaller_is_better for kind in EVALUATORS))  # what is known without a configuration


def is_smaller_better(metric: str, names: Iterable[str] = SMALLER_IS_BETTER) -> bool:
    """Whether the metric's name, without its stage, suite and task, is one of ``names``.

    >>> is_smaller_better("val/sts/stsb/uniformity"), is_smaller_better("val/sts/stsb/spearman")
    (True, False)
    """
    return metric.rsplit("/", 1)[-1] in names
