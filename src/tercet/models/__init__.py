"""Encoders of texts and images: backbones, pooling, heads, and how they are saved."""

from tercet.models.dual import DualEncoder
from tercet.models.encoder import CachedEncoder, ConcatEncoder
from tercet.models.engine.chunking import Execution
from tercet.models.image import ImageEncoder
from tercet.models.pooling import Head
from tercet.models.pretrained import load_backbone, load_pixel_format, load_tokenizer, random_backbone
from tercet.models.text import Encoder, TextEncoder
from tercet.models.vocabulary import word_tokenizer
from tercet.models.words import word_backbone

__all__ = [
    "CachedEncoder",
    "ConcatEncoder",
    "DualEncoder",
    "Encoder",
    "Execution",
    "Head",
    "ImageEncoder",
    "TextEncoder",
    "load_backbone",
    "load_pixel_format",
    "load_tokenizer",
    "random_backbone",
    "word_backbone",
    "word_tokenizer",
]
