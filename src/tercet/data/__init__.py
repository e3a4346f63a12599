"""Sources of rows, transforms of rows to inputs, and batch samplers."""

from tercet.data.bible import Bible
from tercet.data.books import Books
from tercet.data.image_files import ImageFiles
from tercet.data.image_transform import Augmentation, ImageTransform
from tercet.data.passages import Passages
from tercet.data.samplers import NoDuplicatesBatchSampler, PKBatchSampler, RandomBatchSampler, WindowBatchSampler
from tercet.data.text_files import Groups, TextFiles
from tercet.data.text_transform import TextTransform

__all__ = [
    "Augmentation", "Bible", "Books", "Groups", "ImageFiles", "ImageTransform", "NoDuplicatesBatchSampler", "PKBatchSampler",
    "Passages", "RandomBatchSampler", "TextFiles", "TextTransform", "WindowBatchSampler",
]  # fmt: skip
