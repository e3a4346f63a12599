"""A backbone's input where views have changed more than the ids."""

import inspect

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tercet.chance import uniform
from tercet.contract import ERASE_SCALE
from tercet.error import InputError


def first_place(backbone: PreTrainedModel) -> int:
    """The position of a row's first token: RoBERTa's start after the padding's index."""
    after_padding = backbone.config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet")
    return backbone.config.pad_token_id + 1 if after_padding else 0


def changed(
    backbone: PreTrainedModel,
    ids: Tensor,
    keep: Tensor | None = None,
    erase: Tensor | None = None,
    place: Tensor | None = None,
) -> dict[str, Tensor]:
    """``ids (n, L)`` as word vectors with zeros where ``keep (n, L)`` is false and in the columns of ``erase (n, L, 2)``.

    ``place (n, L)`` are positions. Raises ``InputError`` for a backbone that takes no positions.
    """
    if keep is None and erase is None:
        given = {"input_ids": ids}
    else:
        x = backbone.get_input_embeddings()(ids)
        if keep is not None:
            x = x * keep[..., None]
        if erase is not None:
            seed, share = erase[..., None].unbind(-2)
            gone = uniform(seed, torch.arange(x.shape[-1], device=x.device)) * ERASE_SCALE < share
            x = x * ~gone
        given = {"inputs_embeds": x}
    if place is not None:
        if "position_ids" not in inspect.signature(backbone.forward).parameters:
            name = type(backbone).__name__
            raise InputError(
                f"view=shuffle: {name} takes no positions from outside. Use another view, or another backbone."
            )
        given["position_ids"] = place + first_place(backbone)
    return given
