"""Run a transformers backbone on padded or packed rows."""

import inspect
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tercet.errors import InputError, require
from tercet.messages import print_status
from tercet.models.engine import transformers_compat as compat
from tercet.models.engine.chunking import Execution
from tercet.models.engine.deterministic_dropout import DropoutSeeds, replace_dropouts
from tercet.models.engine.layers import replace_layers
from tercet.models.engine.packing import NAME, Packing, autocast_dtype, layer_stack, shorten_last_layer
from tercet.models.weights import check_finite
from tercet.rng import uniform
from tercet.types import RATE_SCALE, TokenBatch, TokenState

TOLERANCE = 1e-4  # between a packed row and the same row alone; hidden states are around 1


def backbone_inputs(backbone: PreTrainedModel, ids: Tensor, state: TokenState, first_position: int) -> dict[str, Any]:
    """Arguments of the backbone for ``ids (n, L)`` and their state; ``InputError`` for one that takes no positions.

    Word vectors are zeroed where ``keep (n, L)`` is false and in the columns of ``feature_cutoff (n, L, 2)``; ``position
    (n, L)`` are positions from ``first_position``.
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
        arguments["position_ids"] = state.position + first_position
    return arguments


class BackboneRunner:
    """Runs a backbone on padded or packed rows.

    When it is made, a few rows run in every layout, so that only those are used in which a row is as it is alone.
    ``token_types`` are the types by token id that the tokenizer gives to a text, where not 0; None passes no types.
    ``compile`` compiles each layer, attention and dropout aside, once for rows of any length; or the backbone as a whole, if
    it has no single stack of layers.
    """

    def __init__(
        self, backbone: PreTrainedModel, pad_id: int, compile: bool = False, token_types: Mapping[int, int] | None = None
    ) -> None:
        self.backbone, self.pad_id, self.token_types = backbone, pad_id, token_types
        self.first_position = compat.first_position(backbone)
        self.max_tokens = compat.max_tokens(backbone)
        self.head_size = compat.head_size(backbone)
        self.dropout_seeds: DropoutSeeds | None = None  # of the backbone's dropouts, if those have been replaced
        self.can_skip_last_layer = False  # whether the last layer can compute first tokens only
        self.output_type: type[Any] = BaseModelOutputWithPooling  # of the backbone
        self.cannot_pad = ""  # why rows cannot be padded
        self.cannot_pack = ""  # why rows cannot be concatenated
        self.compiled: list[nn.Module] = []
        self.compiled_passes: set[tuple[Any, ...]] = set()  # the kinds of pass that have been compiled
        training = backbone.training
        with torch.no_grad(), torch.random.fork_rng(devices=[]):  # some backbones draw numbers, also in evaluation mode
            self._verify_layouts()
        backbone.train(training)
        if compile:
            self.compiled = list(layer_stack(backbone) or [backbone])
        for module in self.compiled:
            module.compile(dynamic=True)  # in place: the names of the weights stay as they are

    def resolve(self, execution: Execution) -> Execution:
        """Replace ``layout="auto"`` and install seeded dropout; ``InputError`` for what this backbone cannot do."""
        reasons = {"packed": self.cannot_pack, "sorted": self.cannot_pad, "padded": self.cannot_pad, "equal_length": ""}
        needed = {"layout": execution.layout, "dropout": "packed" if execution.dropout == "deterministic" else "auto"}
        for name, layout in needed.items():
            if reason := reasons.get(layout):
                kind = "packed" if layout == "packed" else "padded"
                problem = f"{type(self.backbone).__name__} cannot read {kind} rows: {reason}"
                raise InputError(f"`execution.{name}`={getattr(execution, name)}: {problem}. Use `execution.{name}`=auto.")
        replace_layers(self.backbone)
        if not self.cannot_pack and execution.dropout != "torch":
            self.dropout_seeds = replace_dropouts(self.backbone)
        best = next(layout for layout in ("packed", "sorted", "equal_length") if not reasons[layout])
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
        arguments = {**backbone_inputs(self.backbone, ids, state, self.first_position), **self.type_arguments(ids)}
        if packed:
            arguments["attention_mask"] = compat.no_attention_mask(self.backbone)
        else:
            arguments["attention_mask"] = mask if state.attend is None else mask * state.attend
        if packed or seeds:
            attend = None if state.attend is None or not packed else state.attend[0]
            arguments["packing"] = Packing(rows.index, packed, first_token_only, seeds, attend)
        with self._cut_embeddings(state), self._say_compilation(ids.device):
            out: Any = self.backbone(**arguments, output_hidden_states=all_layers)
        if not packed:
            return out, mask
        layers = [x.squeeze(0) for x in (out.hidden_states if all_layers else [out.last_hidden_state])]
        states = [x[:, None] if first_token_only else rows.index.pad(x) for x in layers]
        mask = rows.index.mask[:, :1] if first_token_only else rows.index.mask
        pooler = getattr(self.backbone, "pooler", None)
        pooled = pooler(states[-1]) if pooler is not None else None
        return BaseModelOutputWithPooling(states[-1], pooled, tuple(states)), mask.long()

    @contextmanager
    def _cut_embeddings(self, state: TokenState) -> Iterator[None]:
        """Set to zero what ``attend`` and ``embedding_cutoff`` cut from the output of the embedding layer."""
        if state.attend is None and state.embedding_cutoff is None:
            yield
            return
        embeddings, name = getattr(self.backbone, "embeddings", None), type(self.backbone).__name__
        normalized = embeddings is not None and any(isinstance(m, nn.LayerNorm) for m in embeddings.modules())
        if embeddings is None or not normalized or self.backbone in self.compiled:
            reason = "is compiled" if normalized else "has no embedding layer with normalization, whose output is cut"
            raise InputError(f"A cutoff of variant shen: {name} {reason}. Use the variant input, or another backbone.")

        def cut(module: nn.Module, args: Any, x: Tensor) -> Tensor:
            x = x if state.attend is None else x * state.attend[..., None]
            return x if state.embedding_cutoff is None else x * _drawn_columns(state.embedding_cutoff, x.shape[-1])

        hook = embeddings.register_forward_hook(cut)
        try:
            yield
        finally:
            hook.remove()

    @contextmanager
    def _say_compilation(self, device: torch.device) -> Iterator[None]:
        """Say how long the first pass of a kind takes, in which compiled modules are compiled."""
        kind = (self.backbone.training, torch.is_grad_enabled(), autocast_dtype(device), device)
        if not self.compiled or kind in self.compiled_passes:
            yield
            return
        self.compiled_passes.add(kind)
        start = time.monotonic()
        yield
        backward = "; the first backward pass is compiled as well" if torch.is_grad_enabled() else ""
        print_status(f"Compiling {type(self.backbone).__name__} took {time.monotonic() - start:.0f} s{backward}.")

    def type_arguments(self, ids: Tensor) -> dict[str, Tensor]:
        """The argument ``token_type_ids`` for ``ids (n, L)``, where the backbone needs it."""
        if self.token_types is None:
            return {}
        types = torch.zeros_like(ids)
        for token, number in self.token_types.items():
            types = types.masked_fill(ids == token, number)
        return {"token_type_ids": types}

    def _verify_layouts(self) -> None:
        """Set what this backbone cannot do; ``InputError`` if it does not run, or a row is never as it is alone."""
        name, rows = type(self.backbone).__name__, self._sample_rows([3, 3, 5, 4])
        before = compat.text_settings(self.backbone)
        try:
            self(rows.select(torch.tensor([0, 1])), packed=False)  # in training mode, which Reformer refuses
            self.backbone.eval()
            alone = self._states_alone(rows)
            if self.token_types == {}:  # all types are 0: passed only where that is not what the backbone assumes
                self.token_types = None
                if not _close(self._states(rows.select(torch.tensor([0]))), alone[:1]):
                    self.token_types = {}
            pair = self._states(rows.select(torch.tensor([0, 1])))
            # Any token may stand where a row has ended: the vector of the pad token is 0 at first, in some backbones for ever.
            self.pad_id, pad_id = int(rows.ids[0]), self.pad_id
            padded = self._states(rows)
            self.pad_id = pad_id
        except Exception as error:  # models raise errors of many types
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise InputError(f"`backbone`: {name} cannot encode rows of token ids ({reason}). Use another backbone.") from error
        for key, value in compat.text_settings(self.backbone).items():
            setting = key.rsplit(".", 1)[-1]
            reason = f"a short text changes its {setting} from {before.get(key)} to {value} for all texts after it"
            advice = f"Set {setting} to {value} in the config.json of its folder, or in `backbone.config`."
            require(value == before.get(key), f"`backbone`: {name} is not supported so: {reason}. {advice}")
        shapes = [(n, self.backbone.config.hidden_size) for n in rows.lengths.tolist()]
        if [tuple(states.shape) for states in alone] != shapes:
            got = f"{tuple(alone[0].shape)} for a row of {shapes[0][0]} tokens"
            raise InputError(f"`backbone`: {name} gives {got}, not a vector of {shapes[0][1]} for each. Use another backbone.")
        if not all(bool(states.isfinite().all()) for states in alone):
            check_finite(f"`backbone`: {name}", self.backbone.named_parameters())
            raise InputError(f"`backbone`: {name} gives NaN or infinite values for a few tokens. Use another backbone.")
        if not _close(pair, alone[:2]):
            reason = "a text's embedding would depend on the texts beside it, even on those of its own length"
            raise InputError(f"`backbone`: {name} is not supported: {reason}. Use another backbone.")
        by_longest = "a row's positions would depend on the longest row beside it (LongRoPE)"
        by_longest = by_longest if compat.scales_positions_by_longest(self.backbone) else ""  # which short rows do not show
        self.cannot_pad = by_longest or ("" if _close(padded, alone) else "a row's embedding would depend on its padding")
        self.cannot_pack = by_longest or self._enable_packing(rows, alone)

    def _sample_rows(self, lengths: list[int]) -> TokenBatch:
        size, most = self.backbone.config.vocab_size, torch.tensor(lengths).clamp(max=self.max_tokens)
        ids = 5 + torch.arange(int(most.sum())) % max(1, size - 6)  # ids below 5 are often special
        return TokenBatch((ids + (ids == self.pad_id)) % size, most)

    def _states_alone(self, rows: TokenBatch) -> list[Tensor]:
        return [self._states(rows.select(torch.tensor([i])))[0] for i in range(len(rows))]

    def _states(self, rows: TokenBatch, packed: bool = False, first_token_only: bool = False) -> list[Tensor]:
        """The hidden states ``(length, H)`` of each row, without padding."""
        output: Any = self(rows, packed, first_token_only)[0]
        self.output_type = type(output) if not packed else self.output_type
        lengths = torch.ones_like(rows.lengths) if first_token_only else rows.lengths
        return [states[:n] for states, n in zip(output.last_hidden_state, lengths.tolist(), strict=True)]

    def _enable_packing(self, rows: TokenBatch, alone: list[Tensor]) -> str:
        """Switch the backbone to our attention. Returns why that is not possible, or an empty string."""
        if not compat.supports_custom_attention(self.backbone):
            return "it takes no attention function from outside"
        before, reason = compat.attention_name(self.backbone), ""
        try:
            self.backbone.set_attn_implementation(NAME)
            self.can_skip_last_layer = shorten_last_layer(self.backbone)
            exact = _close(self._states(rows, packed=True), alone)
            if exact and (window := getattr(self.backbone.config, "sliding_window", None)):
                rows = self._sample_rows([3, 4 + window])  # one exceeds the window of attention
                alone = self._states_alone(rows)
                exact = _close(self._states(rows, packed=True), alone)
            if exact and self.can_skip_last_layer:
                exact = _close(self._states(rows, packed=True, first_token_only=True), [states[:1] for states in alone])
            reason = "" if exact else "a row's embedding would depend on its neighbors"
        # Errors of a forward pass whose model passes on neither positions nor the packing, or shapes them otherwise.
        except (AttributeError, InputError, RuntimeError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if reason:
            self.can_skip_last_layer = False
            self.backbone.set_attn_implementation(before)
        return reason


def _drawn_columns(cutoff: Tensor, columns: int) -> Tensor:
    """``(n, L, 2)``, a seed and a rate, to ``(n, L, H)``: false in the columns that rate · H draws with replacement hit."""
    seed, rate = cutoff[..., None].unbind(-2)
    number = torch.arange(columns, device=cutoff.device)
    drawn = number < rate * columns // RATE_SCALE
    hits = torch.zeros_like(drawn, dtype=torch.float32)
    return hits.scatter_add(-1, (uniform(seed, number) * columns).long(), drawn.float()) == 0


def _close(got: list[Tensor], want: list[Tensor]) -> bool:
    return all(a.shape == b.shape and torch.allclose(a, b, TOLERANCE, TOLERANCE) for a, b in zip(got, want, strict=True))
