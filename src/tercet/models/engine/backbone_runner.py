"""Run a transformers backbone on padded or packed rows."""

import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tercet.errors import InputError
from tercet.models.engine import transformers_compat as compat
from tercet.models.engine.chunking import Execution
from tercet.models.engine.deterministic_dropout import DropoutSeeds, replace_dropouts
from tercet.models.engine.packing import NAME, Packing, shorten_last_layer
from tercet.rng import uniform
from tercet.types import RATE_SCALE, TokenBatch, TokenState, pad_rows

TOLERANCE = 1e-4  # between a packed row and the same row alone; hidden states are around 1


def first_position(backbone: PreTrainedModel) -> int:
    """The position of a row's first token: in RoBERTa and relatives positions start after the padding's index."""
    after_padding = backbone.config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet")
    return backbone.config.pad_token_id + 1 if after_padding else 0


def backbone_inputs(backbone: PreTrainedModel, ids: Tensor, state: TokenState) -> dict[str, Any]:
    """Arguments of the backbone for ``ids (n, L)`` and their state; ``InputError`` for one that takes no positions.

    Word vectors are zeroed where ``keep (n, L)`` is false and in the columns of ``feature_cutoff (n, L, 2)``; ``position
    (n, L)`` are positions.
    """
    arguments = {"input_ids": ids}
    if state.keep is not None or state.feature_cutoff is not None:
        x = backbone.get_input_embeddings()(ids)
        if state.keep is not None:
            x = x * state.keep[..., None]
        if state.feature_cutoff is not None:
            seed, rate = state.feature_cutoff[..., None].unbind(-2)
            cut = uniform(seed, torch.arange(x.shape[-1], device=x.device)) * RATE_SCALE < rate
            x = x * ~cut
        arguments = {"inputs_embeds": x}
    if state.position is not None:
        if "position_ids" not in inspect.signature(backbone.forward).parameters:
            name = type(backbone).__name__
            raise InputError(f"A view that shuffles tokens: {name} takes no positions. Use another view or another backbone.")
        arguments["position_ids"] = state.position + first_position(backbone)
    return arguments


class BackboneRunner:
    """Runs a backbone on padded or packed rows."""

    def __init__(self, backbone: PreTrainedModel, pad_id: int, compile: bool) -> None:
        self.backbone, self.pad_id = backbone, pad_id
        self.dropout_seeds: DropoutSeeds | None = None  # of the backbone's dropouts, if those have been replaced
        self.can_skip_last_layer = False  # whether the last layer can compute first tokens only
        # Why rows cannot be concatenated; empty if a forward pass has verified that they do not see each other.
        self.cannot_pack = "it is compiled" if compile else self._enable_packing()
        if compile:
            backbone.compile(dynamic=True)  # in place: the names of the weights stay as they are

    def resolve(self, execution: Execution) -> Execution:
        """Replace ``layout="auto"`` and install seeded dropout; ``InputError`` for what this backbone cannot do."""
        for name, value in (("layout", "packed"), ("dropout", "deterministic")):
            if self.cannot_pack and getattr(execution, name) == value:
                reason = f"{type(self.backbone).__name__} cannot read packed rows: {self.cannot_pack}"
                raise InputError(f"`execution.{name}`={value}: {reason}. Use `execution.{name}`=auto.")
        if not self.cannot_pack and execution.dropout != "torch":
            self.dropout_seeds = replace_dropouts(self.backbone)
        best = "sorted" if self.cannot_pack else "packed"
        return replace(execution, layout=best if execution.layout == "auto" else execution.layout)

    def __call__(
        self, rows: TokenBatch, packed: bool, first_token_only: bool = False, all_layers: bool = False
    ) -> tuple[BaseModelOutputWithPooling, Tensor]:
        """Hidden states ``(n, L, H)`` and ``mask (n, L)``, 1 where there is a token.

        ``all_layers`` returns those of every layer. With ``first_token_only`` only first tokens are read; L may be 1.
        """
        first_token_only = first_token_only and packed and self.can_skip_last_layer and not all_layers
        if packed:
            state = replace(rows.state, position=rows.state_field("position")).map(lambda x: x[None])
            ids = rows.ids[None]
        else:
            ids, mask, state = rows.pad(self.pad_id)
        if self.dropout_seeds is not None:
            self.dropout_seeds.seed = state.dropout_seed
        seeds = self.dropout_seeds if state.dropout_seed is not None else None  # else dropout draws from torch's generator
        arguments = backbone_inputs(self.backbone, ids, state)
        arguments["attention_mask"] = compat.no_attention_mask(self.backbone) if packed else mask
        if packed or seeds:
            arguments["packing"] = Packing(rows.lengths, packed, first_token_only, seeds)
        out: Any = self.backbone(**arguments, output_hidden_states=all_layers)
        if not packed:
            return out, mask
        lengths = torch.ones_like(rows.lengths) if first_token_only else rows.lengths
        states = [pad_rows(x[0], lengths) for x in (out.hidden_states if all_layers else [out.last_hidden_state])]
        mask = (torch.arange(states[-1].shape[1]) < lengths[:, None]).long()
        pooler = getattr(self.backbone, "pooler", None)
        pooled = pooler(states[-1]) if pooler is not None else None
        return BaseModelOutputWithPooling(states[-1], pooled, tuple(states)), mask.to(rows.ids.device, non_blocking=True)

    def _enable_packing(self) -> str:
        """Switch the backbone to our attention. Returns why that is not possible, or an empty string."""
        if not compat.supports_custom_attention(self.backbone):
            return "it takes no attention function from outside"
        before, training = compat.attention_name(self.backbone), self.backbone.training
        try:
            self.backbone.set_attn_implementation(NAME)
            self.can_skip_last_layer = shorten_last_layer(self.backbone)
            reason = "" if self._packing_is_exact() else "a row's embedding would depend on its neighbors"
        # Errors of a forward pass whose model passes on neither positions nor the packing, or shapes them otherwise.
        except (AttributeError, InputError, RuntimeError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if reason:
            self.can_skip_last_layer = False
            self.backbone.set_attn_implementation(before)
        self.backbone.train(training)
        return reason

    @torch.no_grad()
    def _packing_is_exact(self) -> bool:
        """Whether packed rows equal the same rows alone; one of them is longer than a window of attention."""
        config = self.backbone.eval().config
        lengths = torch.tensor([3, 3, 5, 4 + (getattr(config, "sliding_window", None) or 0)])
        ids = 5 + torch.arange(int(lengths.sum())) % max(1, config.vocab_size - 6)  # ids below 5 are often special
        rows = TokenBatch((ids + (ids == self.pad_id)) % config.vocab_size, lengths)
        for first_token_only in (False, True)[: 1 + self.can_skip_last_layer]:
            packed: Any = self(rows, True, first_token_only)[0]
            for i, row in enumerate(packed.last_hidden_state):
                alone: Any = self(rows.select(torch.tensor([i])), packed=False)[0]
                want = alone.last_hidden_state[0, : 1 if first_token_only else None]
                if not torch.allclose(row[: len(want)], want, TOLERANCE, TOLERANCE):
                    return False
        return True
