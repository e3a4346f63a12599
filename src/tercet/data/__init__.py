"""Rows to batches: sources, samplers, tokens, pixels, the data module."""

from tercet.data.batches import GlobalBatches
from tercet.data.bible import Bible
from tercet.data.files import Files
from tercet.data.groups import Groups
from tercet.data.labels import LabelBatches
from tercet.data.module import DataModule, evaluators
from tercet.data.rows import Tokenizing

__all__ = ["Bible", "DataModule", "Files", "GlobalBatches", "Groups", "LabelBatches", "Tokenizing", "evaluators"]
