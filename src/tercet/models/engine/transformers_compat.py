"""Private and undocumented parts of transformers that Tercet relies on; used nowhere else.

tests/models/test_transformers_compat.py checks each of them and names what broke after an upgrade.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, initialization
from transformers.integrations.sdpa_attention import sdpa_attention_forward as sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils.hub import cached_file

initialize_uniform = initialization.uniform_  # (weight, low, high); draws unless the weight has just been loaded
_NUMBER = "tercet_number"  # attribute of numbered modules


def register_attention(name: str, function: Callable[..., Any]) -> None:
    """Make ``function`` available to ``set_attn_implementation(name)``, with the masks of scaled dot-product attention."""
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)


def supports_custom_attention(model: PreTrainedModel) -> bool:
    """Whether the model calls the attention function that its configuration names."""
    return bool(getattr(model, "_supports_attention_backend", False))


def attention_name(model: PreTrainedModel) -> str:
    """The name of the attention function in use."""
    return str(model.config._attn_implementation)


def first_position(model: PreTrainedModel) -> int:
    """The position of a row's first token: in RoBERTa and relatives positions start after the padding's index."""
    tables = [module for name, module in model.named_modules() if name.endswith("position_embeddings")]
    found = (getattr(table, "padding_idx", None) for table in tables)
    return next((index + 1 for index in found if index is not None), 0)


def max_tokens(model: PreTrainedModel) -> int:
    """The most tokens of a row that the model has positions for; XLNet has no limit and says -1, T5 says nothing."""
    positions = getattr(model.config, "max_position_embeddings", None) or 0
    return positions - first_position(model) if positions > 0 else 10**9


def head_size(model: PreTrainedModel) -> int:
    """The columns of a head of attention; those of all heads for a model that does not say how many there are."""
    heads = getattr(model.config, "num_attention_heads", None) or 1
    return int(getattr(model.config, "head_dim", None) or model.config.hidden_size // heads)


def text_settings(model: PreTrainedModel) -> dict[str, str]:
    """The attributes of all modules that are texts, as BigBird's ``attention_type``: a forward pass should change none."""
    modules = model.named_modules()
    return {f"{name}.{key}": x for name, module in modules for key, x in vars(module).items() if isinstance(x, str)}


def scales_positions_by_longest(model: PreTrainedModel) -> bool:
    """Whether rotary positions depend on the longest row of a pass (LongRoPE: beyond the length of pretraining others)."""
    return "'longrope'" in str(getattr(model.config, "rope_parameters", None))


def pooler_is_optional(model: PreTrainedModel) -> bool:
    """Whether the model runs without its pooler; SqueezeBERT's forward pass calls it always."""
    return "add_pooling_layer" in inspect.signature(type(model).__init__).parameters


def no_attention_mask(model: PreTrainedModel) -> dict[str, None] | None:
    """The value of ``attention_mask`` with which the model makes no mask: one None for each type of layer, if it has types."""
    layer_types = getattr(model.config, "layer_types", None)
    return dict.fromkeys(layer_types) if layer_types else None


def pretrained_source(model: PreTrainedModel) -> str:
    """The folder or hub id that the model was loaded from; empty for one with random weights."""
    return str(model.config._name_or_path or "")


def find_file(source: str, file: str) -> Path | None:
    """The path of a file of a folder or hub id; None if there is no such file, or the hub cannot be reached."""
    try:
        found = cached_file(source, file, _raise_exceptions_for_missing_entries=False)
    except OSError:
        return None  # loading the weights, which follows, explains what is wrong
    return Path(found) if found else None


def number_modules(root: nn.Module) -> None:
    """Give each module its index in ``root.modules()``."""
    for number, module in enumerate(root.modules()):
        setattr(module, _NUMBER, number)


def module_number(module: nn.Module) -> int:
    """The index that ``number_modules`` gave the module."""
    return int(getattr(module, _NUMBER))


def is_plain_linear(module: nn.Module) -> bool:
    """Whether ``module`` computes what its weight and bias say, without hooks."""
    return type(module) is nn.Linear and not module._forward_hooks and not module._forward_pre_hooks
