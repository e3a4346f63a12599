"""``Inputs -> (N, D)``: backbones, pooling, heads, and how they run."""

from tercet.model.backbone import pixels, pretrained, random, tokenizer
from tercet.model.encode import Encoding
from tercet.model.encoder import Encoder, TextEncoder
from tercet.model.execution import Execution
from tercet.model.head import Head
from tercet.model.image_encoder import ImageEncoder

__all__ = [
    "Encoder",
    "Encoding",
    "Execution",
    "Head",
    "ImageEncoder",
    "TextEncoder",
    "pixels",
    "pretrained",
    "random",
    "tokenizer",
]
