"""``Inputs -> (N, D)``: backbones, pooling, heads, and how they run."""

from tercet.model.backbone import pixels, pretrained, random, tokenizer
from tercet.model.encode import Encoding, Joined
from tercet.model.encoder import Encoder, TextEncoder
from tercet.model.execution import Execution
from tercet.model.head import Head
from tercet.model.image_encoder import ImageEncoder
from tercet.model.towers import Towers
from tercet.model.vocabulary import vocabulary
from tercet.model.words import words

__all__ = [
    "Encoder",
    "Encoding",
    "Execution",
    "Head",
    "ImageEncoder",
    "Joined",
    "TextEncoder",
    "Towers",
    "pixels",
    "pretrained",
    "random",
    "tokenizer",
    "vocabulary",
    "words",
]
