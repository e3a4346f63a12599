"""``Inputs -> (N, D)``: backbones, pooling, heads, and how they run."""

from tercet.model.backbone import pretrained, random, tokenizer
from tercet.model.encode import Encoding
from tercet.model.encoder import TextEncoder
from tercet.model.execution import Execution
from tercet.model.head import Head

__all__ = ["Encoding", "Execution", "Head", "TextEncoder", "pretrained", "random", "tokenizer"]
