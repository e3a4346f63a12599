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


def backbone_inputs(backbone: PreTrainedModel, ids: Tensor, state: TokenState) -> dict[str, Tensor]:
    """Arguments of the backbone for ``ids (n, L)`` and their state.

    Word vectors are zeroed where ``keep (n, L)`` is false and in the columns of ``feature_cutoff (n, L, 2)``; ``position
    (n, L)`` are positions. Raises ``InputError`` for a backbone that takes no positions.
    """
    keep, feature_cutoff, position = state.keep, state.feature_cutoff, state.position
    if keep is None and feature_cutoff is None:
        arguments = {"input_ids": ids}
    else:
        x = backbone.get_input_embeddings()(ids)
        if keep is not None:
            x = x * keep[..., None]
        if feature_cutoff is not None:
            seed, rate = feature_cutoff[..., None].unbind(-2)
            cut = uniform(seed, torch.arange(x.shape[-1], device=x.device)) * RATE_SCALE < rate
            x = x * ~cut
        arguments = {"inputs_embeds": x}
    if position is not None:
        if "position_ids" not in inspect.signature(backbone.forward).parameters:
            name = type(backbone).__name__
            raise InputError(f"A view that shuffles tokens: {name} takes no positions. Use another view or another backbone.")
        arguments["position_ids"] = position + first_position(backbone)
    return arguments


class BackboneRunner:
    """Runs a backbone on padded or packed rows.

    ``can_pack``: rows can be concatenated without seeing each other, which a forward pass has verified; ``cannot_pack``
    holds the reason if not. ``can_skip_last_layer``: the last layer can compute first tokens only. ``dropout_seeds``: the
    seeds of the backbone's dropouts if those have been replaced.
    """

    def __init__(self, backbone: PreTrainedModel, pad_id: int, compile: bool) -> None:
        self.backbone, self.pad_id = backbone, pad_id
        self.dropout_seeds: DropoutSeeds | None = None
        self.can_skip_last_layer = False
        self.cannot_pack = "it is compiled" if compile else self._enable_packing()
        self.can_pack = not self.cannot_pack
        if compile:
            backbone.compile(dynamic=True)  # in place: the names of the weights stay as they are

    def resolve(self, execution: Execution) -> Execution:
        """Replace ``layout="auto"`` and install seeded dropout; ``InputError`` for what this backbone cannot do."""
        if not self.can_pack and "packed" in (execution.layout, "packed" if execution.dropout == "deterministic" else ""):
            name, value = ("layout", "packed") if execution.layout == "packed" else ("dropout", "deterministic")
            raise InputError(
                f"`execution.{name}`={value}: {type(self.backbone).__name__} cannot read packed rows: {self.cannot_pack}. "
                f"Use `execution.{name}`=auto."
            )
        if self.can_pack and execution.dropout != "torch":
            self.dropout_seeds = replace_dropouts(self.backbone)
        layout = "packed" if self.can_pack else "sorted"
        return replace(execution, layout=layout if execution.layout == "auto" else execution.layout)

    def __call__(
        self, rows: TokenBatch, packed: bool, first_token_only: bool = False, all_layers: bool = False
    ) -> tuple[BaseModelOutputWithPooling, Tensor]:
        """Hidden states ``(n, L, H)`` and ``mask (n, L)``, 1 where there is a token.

        ``all_layers`` returns those of every layer. With ``first_token_only`` only first tokens are read; L may be 1.
        """
        if packed:
            return self._run_packed(rows, first_token_only and self.can_skip_last_layer and not all_layers, all_layers)
        return self._run_padded(rows, all_layers)

    def _run_padded(self, rows: TokenBatch, all_layers: bool = False) -> tuple[BaseModelOutputWithPooling, Tensor]:
        ids, mask, state = rows.pad(self.pad_id)
        seeds = self._set_seeds(state.dropout_seed)
        arguments: dict[str, Any] = backbone_inputs(self.backbone, ids, state)
        if seeds:
            arguments["packing"] = Packing(rows.lengths, packed=False, dropout_seeds=seeds)
        return self.backbone(**arguments, attention_mask=mask, output_hidden_states=all_layers), mask

    def _run_packed(
        self, rows: TokenBatch, first_token_only: bool, all_layers: bool = False
    ) -> tuple[BaseModelOutputWithPooling, Tensor]:
        state = rows.state if rows.state.position is not None else replace(rows.state, position=rows.default("position"))
        state = state.map(lambda x: x[None])
        packing = Packing(rows.lengths, True, first_token_only, self._set_seeds(state.dropout_seed))
        arguments: dict[str, Any] = backbone_inputs(self.backbone, rows.ids[None], state)
        no_mask = compat.no_attention_mask(self.backbone)
        out: Any = self.backbone(**arguments, attention_mask=no_mask, packing=packing, output_hidden_states=all_layers)
        lengths = torch.ones_like(rows.lengths) if first_token_only else rows.lengths
        states = [pad_rows(x[0], lengths) for x in (out.hidden_states if all_layers else [out.last_hidden_state])]
        mask = (torch.arange(states[-1].shape[1]) < lengths[:, None]).long()
        pooler = getattr(self.backbone, "pooler", None)
        pooled = pooler(states[-1]) if pooler is not None else None
        return BaseModelOutputWithPooling(states[-1], pooled, tuple(states)), mask.to(rows.ids.device, non_blocking=True)

    def _set_seeds(self, seed: Tensor | None) -> DropoutSeeds | None:
        """Set the seeds of the next pass; None if dropout draws from torch's generator."""
        if self.dropout_seeds is not None:
            self.dropout_seeds.seed = seed
        return self.dropout_seeds if seed is not None else None

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
            packed: Any = self._run_packed(rows, first_token_only)[0]
            for i, row in enumerate(packed.last_hidden_state):
                alone: Any = self._run_padded(rows.select(torch.tensor([i])))[0]
                want = alone.last_hidden_state[0, : 1 if first_token_only else None]
                if not torch.allclose(row[: len(want)], want, TOLERANCE, TOLERANCE):
                    return False
        return True
