"""Masked language modeling: an auxiliary loss, or continued pretraining."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MODEL_FOR_MASKED_LM_MAPPING, AutoModelForMaskedLM

from tercet.errors import InputError, require
from tercet.messages import print_status
from tercet.models import Encoder, TextEncoder
from tercet.models.engine.chunking import AutoChunks
from tercet.models.engine.replay import Replay
from tercet.models.engine.transformers_compat import pretrained_source
from tercet.models.pretrained import load_mended
from tercet.models.text import special_tokens, word_starts
from tercet.models.weights import check_found
from tercet.rng import derive_seed, uniform
from tercet.types import LossOutput, TokenBatch, TokenState, runs_on_cpu

MLM_PASS, MLM_CHOICE = 1, 2  # mixed into the dropout seeds: the contrastive pass over the same tokens has other masks
IGNORED = -100  # the target of a token that is not predicted
UNSUPPORTED = (
    "Masked language modeling needs a transformer of text with a language-model head; {}. Use another model, as MiniLM or "
    "BERT; `weight`=0 turns the auxiliary loss off."
)


@dataclass(frozen=True)
class MaskedLM:
    """Settings of masked language modeling as an auxiliary loss: the total is contrast + ``weight`` * masked LM.

    The weight is 0.1 in SimCSE (arXiv:2104.08821, appendix A and Table D.2); 0 turns it off. ``probability`` is the share of
    tokens that are chosen; 80 % of them become the mask token, 10 % a random token, 10 % stay (Devlin et al. 2019). Every view
    has its own choice. With ``whole_words`` all tokens of a word are chosen or none. The loss costs a second forward pass.

    >>> MaskedLM(weight=0.1).probability
    0.15
    """

    weight: float = 0.0
    probability: float = 0.15
    whole_words: bool = False

    def __post_init__(self) -> None:
        require(self.weight >= 0, f"`weight`={self.weight}: 0 (off) or more.")
        require(0 < self.probability < 1, f"`probability`={self.probability}: above 0 and below 1, 0.15 in the paper.")

    def build(self, encoder: Encoder) -> "MaskedLMHead | None":
        """The head on that encoder, or None where the weight is 0."""
        if self.weight == 0:
            return None
        parts = encoder.text_parts()
        require(len(parts) == 1, UNSUPPORTED.format(f"{'two encoders have' if parts else 'a model of images has'} none"))
        return MaskedLMHead(self, parts[0])


class MaskedLMHead(nn.Module):
    """The language-model head that ``transformers`` has for a backbone, on that backbone, with shared word embeddings.

    Its weights are the pretrained ones where the backbone's own folder or hub id has them. Where that has none of them the head
    is random, and a line says so; a part of them is refused.
    """

    special: Tensor
    word_start: Tensor

    def __init__(self, settings: MaskedLM, encoder: TextEncoder) -> None:
        super().__init__()
        backbone, tokenizer = encoder.backbone, encoder.tokenizer
        require(tokenizer.mask_token_id is not None, UNSUPPORTED.format("this tokenizer has no mask token"))
        kind, source = backbone.config.model_type, pretrained_source(backbone)
        decodes = getattr(backbone.config, "is_encoder_decoder", False)
        require(not decodes, UNSUPPORTED.format(f"that of {kind} is a decoder, which generates the text"))
        require(type(backbone.config) in MODEL_FOR_MASKED_LM_MAPPING, UNSUPPORTED.format(f"transformers has none for {kind}"))
        lm = pretrained_head(source) if source else AutoModelForMaskedLM.from_config(backbone.config, trust_remote_code=False)
        setattr(lm, lm.base_model_prefix, backbone)
        lm.tie_weights()
        # The head alone, for the chosen tokens only.
        setattr(lm, lm.base_model_prefix, HiddenStates(encoder.runner.output_type))
        try:
            lm.eval()(inputs_embeds=torch.zeros(1, 1, encoder.hidden))
        except Exception as error:  # models raise errors of many types
            reason = f"that of {kind} does not run on hidden states alone ({type(error).__name__}: {error})"
            raise InputError(UNSUPPORTED.format(reason)) from error
        self.lm = lm.train()
        self.settings = settings
        self.execution = encoder.execution
        self.auto_chunks = AutoChunks()
        self._run_backbone = encoder.runner  # not a module: the backbone is not registered a second time
        self._trained = (nn.ModuleList([self.lm, backbone]),)  # in a tuple, for the same reason
        self.replay = Replay()
        self.mask_id = int(tokenizer.mask_token_id)
        self.num_tokens = len(tokenizer)
        self.register_buffer("special", special_tokens(tokenizer), persistent=False)
        self.register_buffer("word_start", word_starts(tokenizer), persistent=False)

    def corrupt(self, ids: Tensor, seed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(T,)`` to the corrupted ids ``(T,)`` and the targets ``(T,)``, -100 for tokens that are not chosen.

        With ``seed (T,)`` the choice is a function of it: the same in any number of processes, and after resuming.
        """
        if seed is None:
            draw, action, random = torch.rand(3, len(ids), dtype=torch.float32, device=ids.device)
        else:
            draw, action, random = (uniform(derive_seed(seed, MLM_CHOICE), i) for i in range(3))
        special = self.special[ids]
        if self.settings.whole_words:  # a row begins with a special token, so that no word continues in the next row
            at = torch.arange(len(ids), device=ids.device)
            first = at.masked_fill(~(self.word_start[ids] | special), 0).cummax(0).values
            draw = draw[first]  # that of the word's first token
        chosen = (draw < self.settings.probability) & ~special
        random_ids = (random * self.num_tokens).long()
        random_ids = torch.where(self.special[random_ids], ids, random_ids)  # a pad token has no position in RoBERTa
        replaced = torch.where(action < 0.9, random_ids, ids).masked_fill(action < 0.8, self.mask_id)
        return torch.where(chosen, replaced, ids), ids.masked_fill(~chosen, IGNORED)

    def forward(self, inputs: TokenBatch) -> LossOutput:
        """The summed cross entropy; the normalizer is the number of chosen tokens.

        They are drawn from the seeds of deterministic dropout where ``inputs`` have these, else from torch's generator.
        """
        execution, (trained,), runner = self.execution.fastest(inputs.ids.device), self._trained, self._run_backbone
        execution = self.auto_chunks.resolve(execution, self, self._rows, inputs)
        # A replay draws the same numbers again only from seeds.
        replays = execution.can_replay and inputs.state.dropout_seed is not None and not runner.compiled
        replay = partial(self.replay, self._rows, trained, runner.head_size, (), execution.recompute)
        sums = execution.run(self._rows, inputs, replay if replays else None)
        return LossOutput(sums[:, 0].sum(), sums[:, 1].detach().sum())

    def _rows(self, rows: TokenBatch) -> Tensor:
        """``n`` rows to ``(n, 2)``: each row's summed cross entropy and number of targets."""
        seed = rows.state.dropout_seed
        ids, targets = self.corrupt(rows.ids, seed)
        state = TokenState(dropout_seed=None if seed is None else derive_seed(seed, MLM_PASS))
        output, _ = self._run_backbone(rows.same_rows(ids, state), self.execution.layout == "packed")
        hidden, targets = output.last_hidden_state, rows.index.pad(targets, IGNORED)
        assert hidden is not None
        sums = self.token_losses(hidden.flatten(0, 1), targets.flatten(), len(ids))
        return sums.view(*targets.shape, 2).sum(1)

    def token_losses(self, hidden: Tensor, targets: Tensor, count: int) -> Tensor:
        """``hidden (M, H)``, ``targets (M,)`` to ``(M, 2)``: cross entropy and 1 where a token is chosen, else zeros.

        ``count`` of the M are tokens, the others padding. Only ``capacity`` of them get logits, the chosen ones first: those of
        all tokens would cost more than the encoder. On a GPU no shape depends on the choice.
        """
        chosen = targets >= 0
        free = runs_on_cpu(targets.device)  # of a GPU the host would wait for all that it has still to do
        slots = int(chosen.sum()) if free else min(capacity(count, self.settings.probability), len(targets))
        at = chosen.byte().argsort(descending=True, stable=True)[:slots]
        logits: Tensor = self.lm(inputs_embeds=hidden.index_select(0, at)[None]).logits[0].float()
        target = targets[at]
        loss = F.cross_entropy(logits, target, ignore_index=IGNORED, reduction="none")
        pairs = torch.stack([loss, (target >= 0).to(loss.dtype)], 1)
        return pairs.new_zeros(len(targets), 2).index_copy(0, at, pairs)


def capacity(tokens: int, probability: float) -> int:
    """More than are chosen of so many tokens: the mean and six standard deviations for words of four pieces.

    English words have 1.3 pieces, so that fewer than one batch in 10^20 has more. Those, the last ones, are corrupted but not
    predicted.
    """
    spread = 6 * math.sqrt(4 * tokens * probability * (1 - probability))
    return min(tokens, 64 * math.ceil((tokens * probability + spread) / 64))


def pretrained_head(source: str) -> Any:
    """The language model of a folder or hub id; ``InputError`` where it has a part of the head's weights only."""
    lm, missing = load_mended(AutoModelForMaskedLM, source)
    prefix, shared = f"{lm.base_model_prefix}.", {id(weight) for weight in lm.get_input_embeddings().parameters()}
    head = {name for name, weight in lm.named_parameters() if not name.startswith(prefix) and id(weight) not in shared}
    lost = sorted(head & set(missing))
    if lost and len(lost) == len(head):
        print_status(f"{source} has no language-model head: that of masked language modeling starts anew, with random weights.")
    else:
        check_found(f"{source}, the language-model head", lost)
    return lm


class HiddenStates(nn.Module):
    """A stand-in for a language model's encoder that returns the hidden states it is given, as ``output_type``."""

    def __init__(self, output_type: Callable[..., Any]) -> None:
        super().__init__()
        self.output_type = output_type

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> Any:
        """``inputs_embeds (1, n, H)``."""
        return self.output_type(last_hidden_state=inputs_embeds)
