"""Run a transformers backbone on padded or packed rows."""

import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tercet.errors import InputError
from tercet.models.engine.chunking import Execution
from tercet.models.engine.deterministic_dropout import DropoutSeeds, replace_dropouts
from tercet.models.engine.packing import NAME, Packing, cut_last_layer
from tercet.rng import uniform
from tercet.types import RATE_SCALE, TokenBatch, TokenState, pad_rows


def first_position(backbone: PreTrainedModel) -> int:
    """The position of a row's first token: RoBERTa's start after the padding's index."""
    after_padding = backbone.config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet")
    return backbone.config.pad_token_id + 1 if after_padding else 0


def backbone_inputs(
    backbone: PreTrainedModel,
    ids: Tensor,
    state: TokenState,
) -> dict[str, Tensor]:
    """``ids (n, L)`` as word vectors with zeros where ``keep (n, L)`` is false and in the columns of ``feature_cutoff (n, L, 2)``.

    ``position (n, L)`` are positions. Raises ``InputError`` for a backbone that takes no positions.
    """
    keep, feature_cutoff, position = state.keep, state.feature_cutoff, state.position
    if keep is None and feature_cutoff is None:
        given = {"input_ids": ids}
    else:
        x = backbone.get_input_embeddings()(ids)
        if keep is not None:
            x = x * keep[..., None]
        if feature_cutoff is not None:
            seed, share = feature_cutoff[..., None].unbind(-2)
            gone = uniform(seed, torch.arange(x.shape[-1], device=x.device)) * RATE_SCALE < share
            x = x * ~gone
        given = {"inputs_embeds": x}
    if position is not None:
        if "position_ids" not in inspect.signature(backbone.forward).parameters:
            name = type(backbone).__name__
            raise InputError(f"view=shuffle: {name} takes no positions from outside. Use another view, or another backbone.")
        given["position_ids"] = position + first_position(backbone)
    return given


EXACT = 1e-4  # how far a packed row may be from the same row alone; hidden states are around 1


class BackboneRunner:
    """A backbone and how it is run.

    ``packs``: rows can stand in one sequence and do not see each other; that is tried, not believed, and ``why`` not is
    kept. ``cuts``: the last layer can compute first tokens only. ``noise``: what its dropouts draw from, where they are
    ours.
    """

    def __init__(self, backbone: PreTrainedModel, pad_id: int, compile: bool) -> None:
        self.backbone, self.pad_id = backbone, pad_id
        self.dropout_seeds: DropoutSeeds | None = None
        self.can_skip_last_layer = False
        self.why = "it is compiled (model.compile=true)" if compile else self._cannot_pack()
        self.can_pack = not self.why
        if compile:
            backbone.compile(dynamic=True)  # in place: the names of the weights stay as they are

    def resolve(self, plan: Execution) -> Execution:
        """What ``auto`` is for this backbone. Raises ``InputError`` for what it cannot."""
        name = type(self.backbone).__name__
        if not self.can_pack and "packed" in (plan.layout, "packed" if plan.dropout == "deterministic" else ""):
            which = "layout=packed" if plan.layout == "packed" else "dropout=deterministic"
            raise InputError(
                f"model.execution.{which}: {name} cannot read packed rows: {self.why}. Use "
                f"model.execution.{which.partition('=')[0]}=auto."
            )
        if self.can_pack and plan.dropout != "torch":
            self.dropout_seeds = replace_dropouts(self.backbone)
        chosen = "packed" if self.can_pack else "sorted"
        return replace(plan, layout=chosen if plan.layout == "auto" else plan.layout)

    def __call__(self, rows: TokenBatch, packed: bool, first: bool, layers: bool) -> tuple[BaseModelOutputWithPooling, Tensor]:
        """Hidden states ``(n, L, H)`` and ``mask (n, L)``, 1 where there is a token.

        ``layers``: of all layers. ``first``: only first tokens are read, L may be 1.
        """
        return (
            self._packed(rows, first and self.can_skip_last_layer and not layers, layers)
            if packed
            else self._padded(rows, layers)
        )

    def _padded(self, rows: TokenBatch, layers: bool) -> tuple[BaseModelOutputWithPooling, Tensor]:
        ids, mask, state = rows.pad(self.pad_id)
        noise = self._noise(state.dropout_seed)
        given: dict[str, Any] = backbone_inputs(self.backbone, ids, state)
        if noise:
            given["packing"] = Packing(rows.lengths, False, False, noise)
        return self.backbone(**given, attention_mask=mask, output_hidden_states=layers), mask

    def _packed(self, rows: TokenBatch, first: bool, layers: bool) -> tuple[BaseModelOutputWithPooling, Tensor]:
        state = rows.state if rows.state.position is not None else replace(rows.state, position=rows.default("position"))
        state = state.map(lambda x: x[None])
        noise = self._noise(state.dropout_seed)
        given: dict[str, Any] = backbone_inputs(self.backbone, rows.ids[None], state)
        kinds = getattr(self.backbone.config, "layer_types", None)
        no_mask = dict.fromkeys(kinds) if kinds else None
        packing = Packing(rows.lengths, True, first, noise)
        out: Any = self.backbone(**given, attention_mask=no_mask, packing=packing, output_hidden_states=layers)
        length = torch.ones_like(rows.lengths) if first else rows.lengths
        states = [pad_rows(x[0], length) for x in (out.hidden_states if layers else [out.last_hidden_state])]
        mask = (torch.arange(states[-1].shape[1]) < length[:, None]).long()
        pooler = getattr(self.backbone, "pooler", None)
        pooled = pooler(states[-1]) if pooler is not None else None
        return BaseModelOutputWithPooling(states[-1], pooled, tuple(states)), mask.to(rows.ids.device, non_blocking=True)

    def _noise(self, seed: Tensor | None) -> DropoutSeeds | None:
        """Set for what is computed next; None where torch draws."""
        if self.dropout_seeds is not None:
            self.dropout_seeds.seed = seed
        return self.dropout_seeds if seed is not None else None

    def _cannot_pack(self) -> str:
        """Why rows cannot stand in one sequence; empty where they can."""
        if not getattr(self.backbone, "_supports_attention_backend", False):
            return "it takes no attention function from outside"
        before = self.backbone.config._attn_implementation
        training = self.backbone.training
        try:
            self.backbone.set_attn_implementation(NAME)
            self.can_skip_last_layer = cut_last_layer(self.backbone)
            why = "" if self._agrees() else "a row's embedding would depend on its neighbours"
        # What a forward pass raises whose model passes on neither positions nor the packing, or shapes them otherwise.
        except (AttributeError, InputError, RuntimeError, TypeError, ValueError) as error:
            why = f"{type(error).__name__}: {error}".splitlines()[0]
        if why:
            self.can_skip_last_layer = False
            self.backbone.set_attn_implementation(before)
        self.backbone.train(training)
        return why

    @torch.no_grad()
    def _agrees(self) -> bool:
        """Whether rows side by side come out as they do alone; one is longer than a window of attention."""
        config = self.backbone.eval().config
        length = torch.tensor([3, 3, 5, 4 + (getattr(config, "sliding_window", None) or 0)])
        ids = 5 + torch.arange(int(length.sum())) % (config.vocab_size - 6)
        rows = TokenBatch(ids + (ids == self.pad_id), length)
        for first in (False, True)[: 1 + self.can_skip_last_layer]:
            together: Any = self._packed(rows, first, False)[0]
            for i, row in enumerate(together.last_hidden_state):
                alone: Any = self._padded(rows.select(torch.tensor([i])), False)[0]
                want = alone.last_hidden_state[0, : 1 if first else None]
                if not torch.allclose(row[: len(want)], want, EXACT, EXACT):
                    return False
        return True
