"""Training with PyTorch Lightning: objectives, data module, optimizers, callbacks, loggers."""

from tercet.training.contrastive import Contrastive, Memory
from tercet.training.datamodule import DataModule, RunLength
from tercet.training.masked_lm import MaskedLM
from tercet.training.objectives import Classification, FaceNet, Pretraining, QuickThoughts, SimCSESup, SimCSEUnsup

__all__ = [
    "Classification", "Contrastive", "DataModule", "FaceNet", "MaskedLM", "Memory", "Pretraining", "QuickThoughts",
    "RunLength", "SimCSESup", "SimCSEUnsup",
]  # fmt: skip
