"""What a tokenizer's pieces are: the beginning of a word, its continuation, or a special token."""

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tercet.model.encoder import Encoder, TextEncoder, limit
from tercet.model.towers import Towers

CONTINUES = "##"  # WordPiece marks continuations
BEGINS = ("Ġ", "▁", " ")  # byte-level BPE and SentencePiece mark beginnings


def begins_word(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """``(V,)`` true for pieces that begin a word; all of them where the tokenizer marks nothing."""
    pieces = [str(tokenizer.convert_ids_to_tokens(i)) for i in range(len(tokenizer))]
    if any(piece.startswith(CONTINUES) for piece in pieces if piece != CONTINUES):
        return torch.tensor([not piece.startswith(CONTINUES) for piece in pieces])
    begins = torch.tensor([piece.startswith(BEGINS) for piece in pieces])
    # A mark on a handful of pieces is no convention: those of a vocabulary of whole words are plain.
    return begins | special(tokenizer) if begins.float().mean() > 0.05 else torch.ones(len(pieces), dtype=torch.bool)


def pieces_of(encoder: Encoder) -> tuple[Tensor, Tensor, int | None, int] | None:
    """What views of texts need: ``begins_word``, ``special``, the mask's id if there is one, and the longest row."""
    if isinstance(encoder, Towers):
        return pieces_of(encoder.f)
    if not isinstance(encoder, TextEncoder):
        return None
    tokenizer = encoder.tokenizer
    fixed = special(tokenizer)
    if tokenizer.unk_token_id is not None:
        fixed[tokenizer.unk_token_id] = False  # stands for a word of the text
    return begins_word(tokenizer), fixed, tokenizer.mask_token_id, limit(encoder.backbone, tokenizer)


def special(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """``(V,)`` true for special tokens."""
    out = torch.zeros(len(tokenizer), dtype=torch.bool)
    out[sorted(set(tokenizer.all_special_ids))] = True
    return out
