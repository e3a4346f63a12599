"""Views: edits that make two different inputs of one text."""

from tercet.views.text_views import (
    Crop,
    Deletion,
    FeatureCutoff,
    Masking,
    Repetition,
    Shuffle,
    SpanCutoff,
    TokenCutoff,
    TokenInfo,
    View,
    Views,
)

__all__ = [
    "Crop",
    "Deletion",
    "FeatureCutoff",
    "Masking",
    "Repetition",
    "Shuffle",
    "SpanCutoff",
    "TokenCutoff",
    "TokenInfo",
    "View",
    "Views",
]
