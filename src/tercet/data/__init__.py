"""Rows to batches: sources, samplers, tokens, the data module."""

from tercet.data.bible import Bible
from tercet.data.files import Files
from tercet.data.groups import Groups
from tercet.data.module import DataModule, evaluators

__all__ = ["Bible", "DataModule", "Files", "Groups", "evaluators"]
