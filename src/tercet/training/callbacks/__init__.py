"""Lightning callbacks."""

from tercet.training.callbacks.checkpoints import GracefulStop, LastCheckpoint, RNGState
from tercet.training.callbacks.embeddings import EmbeddingFigures
from tercet.training.callbacks.evaluation import Evaluation
from tercet.training.callbacks.figures import BeforeAfter, EvaluatorFigures
from tercet.training.callbacks.hard_labels import HardLabels
from tercet.training.callbacks.monitoring import CollapseWarning, Progress, SkipNonFinite, Throughput

__all__ = [
    "BeforeAfter", "CollapseWarning", "EmbeddingFigures", "Evaluation", "EvaluatorFigures", "GracefulStop", "HardLabels",
    "LastCheckpoint", "Progress", "RNGState", "SkipNonFinite", "Throughput",
]  # fmt: skip
