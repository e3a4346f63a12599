"""Views: edits that make two different inputs of one text."""

from tercet.views.rephrasing import MLMReplacement, Synonyms
from tercet.views.text_views import *  # noqa: F403
from tercet.views.text_views import __all__ as _edits

__all__ = [*_edits, "MLMReplacement", "Synonyms"]
