"""Masked language modeling: an auxiliary loss, or continued pretraining."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM
from transformers.modeling_outputs import BaseModelOutput

from tercet.errors import InputError
from tercet.models import DualEncoder, Encoder, TextEncoder
from tercet.models.pretrained import load_pretrained
from tercet.models.text import special_tokens, word_starts
from tercet.rng import derive_seed
from tercet.types import LossOutput, TokenBatch, TokenState

ANOTHER = 1  # what this pass's dropout seeds are mixed with: the contrast has its own


@dataclass(frozen=True)
class MaskedLM:
    """Settings: the total is contrast + ``weight`` · masked LM (arXiv:2104.08821 section 6.3; 0.1 there, 0 is off).

    ``probability`` of the tokens are chosen; 80 % of those become the mask, 10 % a random token, 10 % stay (Devlin et
    al. 2019). Every view draws its own. With ``whole_words`` all pieces of a word are chosen or none. Costs a second
    forward pass.
    """

    weight: float
    probability: float
    whole_words: bool

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise InputError(f"objective.mlm.weight={self.weight}: 0 (off) or more.")
        if not 0 < self.probability < 1:
            raise InputError(f"objective.mlm.probability={self.probability}: above 0 and below 1, 0.15 in the paper.")

    def build(self, encoder: Encoder) -> "MaskedLMHead | None":
        """The head on that encoder, or None where the weight is 0."""
        if self.weight == 0:
            return None
        if not isinstance(encoder, TextEncoder):
            kind = "two towers" if isinstance(encoder, DualEncoder) else "a model of images"
            raise InputError(_refused(f"{kind} has none"))
        return MaskedLMHead(self, encoder)


def _refused(why: str) -> str:
    return (
        f"A masked language model needs a transformer of text; {why}. Use another model, as model=minilm; where it is an "
        "auxiliary (objective.mlm.weight), 0 leaves it out."
    )


class MaskedLMHead(nn.Module):
    """The language-model head that ``transformers`` has for the backbone, which it is run on; word vectors are shared.

    Its weights are the pretrained ones where the backbone's own folder or hub id holds them, else drawn at random.
    """

    def __init__(self, settings: MaskedLM, encoder: TextEncoder) -> None:
        super().__init__()
        backbone, tokenizer = encoder.backbone, encoder.tokenizer
        if tokenizer.mask_token_id is None:
            raise InputError(_refused("this tokenizer has no mask token"))
        source = backbone.config._name_or_path
        try:
            lm = load_pretrained(AutoModelForMaskedLM, source, "model.backbone.name") if source else None
            lm = lm or AutoModelForMaskedLM.from_config(backbone.config)
        except InputError:
            raise
        except ValueError as error:
            raise InputError(_refused(f"transformers has none for {backbone.config.model_type}")) from error
        setattr(lm, lm.base_model_prefix, backbone)
        lm.tie_weights()
        setattr(lm, lm.base_model_prefix, HiddenStates())  # the head alone: it sees no more than the chosen tokens
        self.lm = lm.train()
        self.settings = settings
        self.execution = encoder.execution
        self._reading = encoder.reading  # no module: its backbone is not registered a second time
        self.mask_id = int(tokenizer.mask_token_id)
        self.words = len(tokenizer)
        self.register_buffer("special", special_tokens(tokenizer), persistent=False)
        self.register_buffer("begins", word_starts(tokenizer), persistent=False)

    special: Tensor
    begins: Tensor

    def corrupt(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """``(T,)`` to the corrupted ids ``(T,)`` and the targets ``(T,)``, -100 where nothing is asked."""
        draw = torch.rand(ids.shape, device=ids.device)
        if self.settings.whole_words:  # rows begin with a special token: no word goes over from one to the next
            word = (self.begins[ids] | self.special[ids]).long().cumsum(0)
            draw = draw[word - word[0]]
        chosen = (draw < self.settings.probability) & ~self.special[ids]
        fate = torch.rand(ids.shape, device=ids.device)
        noise = torch.randint(self.words, ids.shape, device=ids.device)
        replaced = torch.where(fate < 0.8, torch.full_like(ids, self.mask_id), torch.where(fate < 0.9, noise, ids))
        return torch.where(chosen, replaced, ids), ids.masked_fill(~chosen, -100)

    def forward(self, inputs: TokenBatch) -> LossOutput:
        """``count`` is the number of chosen tokens: the mean is over the tokens of the global batch."""
        corrupted, targets = self.corrupt(inputs.ids)
        # Ids and targets travel as one row, so that any order and chunking keeps them together.
        seed = inputs.state.dropout_seed
        state = TokenState(dropout_seed=None if seed is None else derive_seed(seed, ANOTHER))
        paired = TokenBatch(torch.stack([corrupted, targets], 1), inputs.lengths, state)
        self.execution = self.execution.resolve_auto_chunks(self, self._rows, paired)
        sums = self.execution.run(self._rows, paired)
        return LossOutput(sums[:, 0].sum(), sums[:, 1].detach().sum())

    def _rows(self, paired: TokenBatch) -> Tensor:
        """``n`` rows of ``ids (T, 2)`` to ``(n, 2)``: each row's summed cross entropy and number of targets."""
        ids, asked = (replace(paired, ids=ids) for ids in paired.ids.unbind(-1))
        output, _ = self._reading(ids, self.execution.layout == "packed", first=False, layers=False)
        hidden, targets = output.last_hidden_state, asked.pad(-100)[0]
        assert hidden is not None
        chosen = targets >= 0
        # Logits of the whole vocabulary, for these tokens only: of all of them they would cost more than the encoder.
        logits = self.lm(inputs_embeds=hidden[chosen][None]).logits[0].float()
        loss = F.cross_entropy(logits, targets[chosen], reduction="none")
        row = torch.arange(len(chosen), device=chosen.device)[:, None].expand_as(chosen)[chosen]
        sums = loss.new_zeros(len(chosen)).index_add(0, row, loss)
        return torch.stack([sums, chosen.sum(1).to(sums.dtype)], 1)


class HiddenStates(nn.Module):
    """Stands where a language model has its encoder, and hands on the hidden states that it is given."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> BaseModelOutput:
        """``inputs_embeds (1, n, H)``."""
        return BaseModelOutput(last_hidden_state=inputs_embeds)
