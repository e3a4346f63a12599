"""Evaluators: functions of an ``encode`` function that return metrics."""

from tercet.evaluation.adjacent_sentences import AdjacentSentences
from tercet.evaluation.alignment_uniformity import AlignmentUniformity, alignment, uniformity
from tercet.evaluation.clustering import Clustering
from tercet.evaluation.inputs import EvaluatorGroup
from tercet.evaluation.mteb import MTEB
from tercet.evaluation.nearest_neighbor import NearestNeighbor
from tercet.evaluation.retrieval import Retrieval
from tercet.evaluation.sts import STS, sts_table
from tercet.evaluation.transfer import Transfer
from tercet.evaluation.verification import Verification

__all__ = [
    "MTEB", "STS", "AdjacentSentences", "AlignmentUniformity", "Clustering", "EvaluatorGroup", "NearestNeighbor", "Retrieval",
    "Transfer", "Verification", "alignment", "sts_table", "uniformity",
]  # fmt: skip
