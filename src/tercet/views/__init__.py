"""Views: edits that make two different inputs of one text."""

from tercet.views.text_views import *  # noqa: F403
from tercet.views.text_views import __all__ as __all__
