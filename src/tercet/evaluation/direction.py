"""The names of metrics that are better when smaller, as the evaluators declare."""

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
