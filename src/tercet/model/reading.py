"""Rows of tokens through a backbone, padded or packed, to what pooling reads."""

import dataclasses
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tercet.contract import Ragged, spread
from tercet.error import InputError
from tercet.model.changed import changed
from tercet.model.dropout import Noise, replace
from tercet.model.execution import Execution
from tercet.model.packing import NAME, Packing, cut_last_layer

EXACT = 1e-4  # how far a packed row may be from the same row alone; hidden states are around 1


class Reading:
    """A backbone and how it is run.

    ``packs``: rows can stand in one sequence and do not see each other; that is tried, not believed, and ``why`` not is
    kept. ``cuts``: the last layer can compute first tokens only. ``noise``: what its dropouts draw from, where they are
    ours.
    """

    def __init__(self, backbone: PreTrainedModel, pad_id: int, compile: bool) -> None:
        self.backbone, self.pad_id = backbone, pad_id
        self.noise: Noise | None = None
        self.cuts = False
        self.why = "it is compiled (model.compile=true)" if compile else self._cannot_pack()
        self.packs = not self.why
        if compile:
            backbone.compile(dynamic=True)  # in place: the names of the weights stay as they are

    def settle(self, plan: Execution) -> Execution:
        """What ``auto`` is for this backbone. Raises ``InputError`` for what it cannot."""
        name = type(self.backbone).__name__
        if not self.packs and "packed" in (plan.layout, "packed" if plan.dropout == "keyed" else ""):
            which = "layout=packed" if plan.layout == "packed" else "dropout=keyed"
            raise InputError(
                f"model.execution.{which}: {name} cannot read packed rows: {self.why}. Use "
                f"model.execution.{which.partition('=')[0]}=auto."
            )
        if self.packs and plan.dropout != "torch":
            self.noise = replace(self.backbone)
        chosen = "packed" if self.packs else "sorted"
        return dataclasses.replace(plan, layout=chosen if plan.layout == "auto" else plan.layout)

    def __call__(
        self, rows: Ragged, packed: bool, first: bool, layers: bool
    ) -> tuple[BaseModelOutputWithPooling, Tensor]:
        """Hidden states ``(n, L, H)`` and ``mask (n, L)``, 1 where there is a token.

        ``layers``: of all layers. ``first``: only first tokens are read, L may be 1.
        """
        return self._packed(rows, first and self.cuts and not layers, layers) if packed else self._padded(rows, layers)

    def _padded(self, rows: Ragged, layers: bool) -> tuple[BaseModelOutputWithPooling, Tensor]:
        ids, mask, more = rows.padded(self.pad_id)
        noise = self._noise(more.pop("noise", None))
        given: dict[str, Any] = changed(self.backbone, ids, **more)
        if noise:
            given["packing"] = Packing(rows.length, False, False, noise)
        return self.backbone(**given, attention_mask=mask, output_hidden_states=layers), mask

    def _packed(self, rows: Ragged, first: bool, layers: bool) -> tuple[BaseModelOutputWithPooling, Tensor]:
        more = {name: value[None] for name, value in rows.more.items()}
        noise = self._noise(more.pop("noise", None))
        more.setdefault("place", rows.unchanged("place")[None])
        given: dict[str, Any] = changed(self.backbone, rows.ids[None], **more)
        kinds = getattr(self.backbone.config, "layer_types", None)
        no_mask = dict.fromkeys(kinds) if kinds else None
        packing = Packing(rows.length, True, first, noise)
        out: Any = self.backbone(**given, attention_mask=no_mask, packing=packing, output_hidden_states=layers)
        length = torch.ones_like(rows.length) if first else rows.length
        states = [spread(x[0], length) for x in (out.hidden_states if layers else [out.last_hidden_state])]
        mask = (torch.arange(states[-1].shape[1]) < length[:, None]).long()
        pooler = getattr(self.backbone, "pooler", None)
        pooled = pooler(states[-1]) if pooler is not None else None
        return BaseModelOutputWithPooling(states[-1], pooled, tuple(states)), mask.to(
            rows.ids.device, non_blocking=True
        )

    def _noise(self, seed: Tensor | None) -> Noise | None:
        """Set for what is computed next; None where torch draws."""
        if self.noise is not None:
            self.noise.seed = seed
        return self.noise if seed is not None else None

    def _cannot_pack(self) -> str:
        """Why rows cannot stand in one sequence; empty where they can."""
        if not getattr(self.backbone, "_supports_attention_backend", False):
            return "it takes no attention function from outside"
        before = self.backbone.config._attn_implementation
        training = self.backbone.training
        try:
            self.backbone.set_attn_implementation(NAME)
            self.cuts = cut_last_layer(self.backbone)
            why = "" if self._agrees() else "a row's embedding would depend on its neighbours"
        # What a forward pass raises whose model passes on neither positions nor the packing, or shapes them otherwise.
        except (AttributeError, InputError, RuntimeError, TypeError, ValueError) as error:
            why = f"{type(error).__name__}: {error}".splitlines()[0]
        if why:
            self.cuts = False
            self.backbone.set_attn_implementation(before)
        self.backbone.train(training)
        return why

    @torch.no_grad()
    def _agrees(self) -> bool:
        """Whether rows side by side come out as they do alone; one is longer than a window of attention."""
        config = self.backbone.eval().config
        length = torch.tensor([3, 3, 5, 4 + (getattr(config, "sliding_window", None) or 0)])
        ids = 5 + torch.arange(int(length.sum())) % (config.vocab_size - 6)
        rows = Ragged(ids + (ids == self.pad_id), length)
        for first in (False, True)[: 1 + self.cuts]:
            together: Any = self._packed(rows, first, False)[0]
            for i, row in enumerate(together.last_hidden_state):
                alone: Any = self._padded(rows.take(torch.tensor([i])), False)[0]
                want = alone.last_hidden_state[0, : 1 if first else None]
                if not torch.allclose(row[: len(want)], want, EXACT, EXACT):
                    return False
        return True
