"""Lightning callbacks."""

from tercet.training.callbacks.checkpoints import LastCheckpoint, RNGState
from tercet.training.callbacks.embeddings import EmbeddingFigures
from tercet.training.callbacks.evaluation import Evaluation
from tercet.training.callbacks.figures import BeforeAfter, EvaluatorFigures
from tercet.training.callbacks.graceful_stop import GracefulStop
from tercet.training.callbacks.hard_labels import HardLabels
from tercet.training.callbacks.health import CollapseWarning, SkipNonFinite
from tercet.training.callbacks.throughput import Progress, Throughput

__all__ = [
    "BeforeAfter",
    "CollapseWarning",
    "EmbeddingFigures",
    "Evaluation",
    "EvaluatorFigures",
    "GracefulStop",
    "HardLabels",
    "LastCheckpoint",
    "Progress",
    "RNGState",
    "SkipNonFinite",
    "Throughput",
]
