"""Contrastive losses: sums over anchor rows, scored against a set of keys; called with tensors, they return the mean."""

from tercet.losses.context import ContextLoss
from tercet.losses.info_nce import InfoNCE
from tercet.losses.triplet import TripletLoss, mine

__all__ = ["ContextLoss", "InfoNCE", "TripletLoss", "mine"]
