"""LightningModules: what a batch means, and the step they share."""

from tercet.objective.mlm import MaskedLM
from tercet.objective.simcse import SimCSESup, SimCSEUnsup

__all__ = ["MaskedLM", "SimCSESup", "SimCSEUnsup"]
