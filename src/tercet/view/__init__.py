"""What makes two looks at one text."""

from tercet.view.cutoff import FeatureCutoff, SpanCutoff, TokenCutoff
from tercet.view.view import Pieces, View, Views
from tercet.view.words import Crop, Deletion, Masking, Repetition, Shuffle

__all__ = [
    "Crop",
    "Deletion",
    "FeatureCutoff",
    "Masking",
    "Pieces",
    "Repetition",
    "Shuffle",
    "SpanCutoff",
    "TokenCutoff",
    "View",
    "Views",
]
