"""Rows to batches: sources, samplers, tokens, pixels, the data module."""

from tercet.data.augment import Augment
from tercet.data.batches import GlobalBatches
from tercet.data.bible import Bible
from tercet.data.books import Books
from tercet.data.decoding import Decoding
from tercet.data.files import Files
from tercet.data.groups import Groups
from tercet.data.images import ImageFiles
from tercet.data.labels import LabelBatches
from tercet.data.module import DataModule, evaluators
from tercet.data.rows import Tokenizing
from tercet.data.windows import WindowBatches

__all__ = [
    "Augment",
    "Bible",
    "Books",
    "DataModule",
    "Decoding",
    "Files",
    "GlobalBatches",
    "Groups",
    "ImageFiles",
    "LabelBatches",
    "Tokenizing",
    "WindowBatches",
    "evaluators",
]
