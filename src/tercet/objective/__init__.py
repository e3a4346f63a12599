"""LightningModules: what a batch means, and the step they share."""

from tercet.objective.facenet import FaceNet
from tercet.objective.memory import Memory
from tercet.objective.mlm import MaskedLM
from tercet.objective.pretraining import Pretraining
from tercet.objective.quick_thoughts import QuickThoughts
from tercet.objective.simcse import SimCSESup, SimCSEUnsup

__all__ = ["FaceNet", "MaskedLM", "Memory", "Pretraining", "QuickThoughts", "SimCSESup", "SimCSEUnsup"]
