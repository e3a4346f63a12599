"""Encoders of texts and images: backbones, pooling, heads, and how they are saved and loaded."""

from tercet.models.encoder import CachedEncoder, ConcatEncoder, Encoder
from tercet.models.engine.chunking import Execution
from tercet.models.folder import load, save_model
from tercet.models.image import ImageEncoder
from tercet.models.pooling import Head
from tercet.models.pretrained import load_backbone, load_pixel_format, load_tokenizer, random_backbone
from tercet.models.text import DualEncoder, TextEncoder
from tercet.models.vocabulary import make_tokenizer, word_tokenizer
from tercet.models.words import word_backbone

__all__ = [
    "CachedEncoder", "ConcatEncoder", "DualEncoder", "Encoder", "Execution", "Head", "ImageEncoder", "TextEncoder", "load",
    "load_backbone", "load_pixel_format", "load_tokenizer", "make_tokenizer", "random_backbone", "save_model",
    "word_backbone", "word_tokenizer",
]  # fmt: skip
