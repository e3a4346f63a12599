"""Families of text models of transformers: is an embedding that of transformers' own model, which runs each text alone?

``python -m benchmarks.families [family ...]`` makes a tiny model of each family with random weights and its tokenizer, encodes
a few texts in every layout, beside each other, and prints the largest difference from transformers' model on one text at a
time, the same for masked language modeling, and what is refused. Two minutes on one core.
"""

import string
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    AutoModelForMaskedLM,
    BertTokenizer,
    FunnelTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    XLNetTokenizer,
)  # fmt: skip
from transformers import logging as transformers_logging

from tercet.errors import InputError
from tercet.models import Execution, TextEncoder, random_backbone
from tercet.models.engine.chunking import LAYOUTS
from tercet.rng import derive_seed
from tercet.training.masked_lm import MaskedLM

TEXTS = ["a b", "abc de f gh", "x", "one two three four five six", "q w e r t y u i", "hello there"]
LONG = "a b c d e f g h i j " * 20  # more tokens than the models have positions for
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>", "<cls>", "<sep>")
COMMON = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 40, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0,
    "sep_token_id": 2,
}  # fmt: skip
T5: dict[str, Any] = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
SIZES = {"layers": 2, "attention_heads": 2, "ffn_dim": 64}
BART: dict[str, Any] = {"d_model": 32, **{f"{side}_{k}": n for side in ("encoder", "decoder") for k, n in SIZES.items()}}
XLM: dict[str, Any] = {"emb_dim": 32, "n_layers": 2, "n_heads": 2, "pad_index": 1}
DEBERTA: dict[str, Any] = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
GROUPED: dict[str, Any] = {"num_key_value_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {  # what differs from COMMON; None leaves a key out
    "albert": {"embedding_size": 16}, "bart": BART, "bert": {}, "bert-generation": {},
    "big_bird": {"attention_type": "original_full"}, "big_bird block_sparse": {"model_type": "big_bird"},
    "bigbird_pegasus": {**BART, "attention_type": "original_full"}, "bloom": {}, "camembert": {},
    "convbert": {"embedding_size": 32}, "data2vec-text": {}, "deberta": DEBERTA,
    "deberta-v2": {**DEBERTA, "position_buckets": 8},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}, "electra": {"embedding_size": 16}, "ernie": {},
    "esm": {"position_embedding_type": "rotary", "mask_token_id": 4}, "eurobert": GROUPED, "flaubert": XLM, "fnet": {},
    "funnel": {"block_sizes": [1, 1], "block_repeats": [1, 1], "d_model": 32, "n_head": 2, "d_head": 16, "d_inner": 64,
               "num_hidden_layers": None, "architectures": ["FunnelModel"]},
    "gemma3_text": {**GROUPED, "head_dim": 16}, "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 40}, "gte": {},
    "ibert": {}, "jina_embeddings_v3": {}, "layoutlm": {}, "llama": GROUPED, "longformer": {"attention_window": 8},
    "luke": {"entity_vocab_size": 4, "entity_emb_size": 8}, "megatron-bert": {}, "mistral": {**GROUPED, "sliding_window": 8},
    "mobilebert": {"embedding_size": 32, "intra_bottleneck_size": 16, "true_hidden_size": 16, "num_feedforward_networks": 1},
    "modernbert": {"local_attention": 6, "global_attn_every_n_layers": 2}, "mpnet": {}, "mra": {}, "mt5": T5, "nomic_bert": {},
    "nystromformer": {"num_landmarks": 4, "segment_means_seq_len": 4}, "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "pegasus": BART,
    "phi3 longrope": {**GROUPED, "model_type": "phi3", "original_max_position_embeddings": 16, "rope_scaling": {
        "rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 16}},
    "qwen2": GROUPED, "qwen3": {**GROUPED, "head_dim": 16},
    "reformer": {"attention_head_size": 16, "axial_pos_embds": False, "attn_layers": ["local", "local"],
                 "local_attn_chunk_length": 8, "feed_forward_size": 64, "is_decoder": False},
    "rembert": {"input_embedding_size": 16, "output_embedding_size": 16}, "roberta": {}, "roberta-prelayernorm": {},
    "roc_bert": {"enable_shape": False, "enable_pronunciation": False}, "roformer": {"embedding_size": 32},
    "squeezebert": {"embedding_size": 32}, "t5": {**T5, "max_position_embeddings": None}, "umt5": T5, "xlm": XLM,
    "xlm-roberta": {}, "xlm-roberta-xl": {},
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64, "max_position_embeddings": None},
    "xmod": {"languages": ["en"], "default_language": "en"}, "yoso": {},
}  # fmt: skip


@dataclass
class Outcome:
    """What a family does: differences from transformers by layout, or why it is refused."""

    family: str
    layout: str = ""  # that is chosen
    max_length: int = 0
    difference: dict[str, float] = field(default_factory=dict)  # of embeddings, by layout
    masked_lm: float | str = ""  # difference of its loss, or why it is refused
    refused: str = ""


def make_backbone(family: str) -> PreTrainedModel:
    """A tiny model of that family with random weights."""
    values = {"model_type": family, **COMMON, **FAMILIES[family]}
    return random_backbone({name: value for name, value in values.items() if value is not None})


def make_tokenizer(family: str) -> PreTrainedTokenizerBase:
    """A tokenizer of letters: the family's own for XLNet, Funnel and BERT, which give token types, else RoBERTa's order."""
    letters = [*string.ascii_lowercase]
    vocabulary = {piece: i for i, piece in enumerate([*SPECIAL, *letters])}
    if family == "xlnet":
        return XLNetTokenizer(vocab=[(piece, -1.0) for piece in [*SPECIAL, "▁", *letters]], unk_id=3)
    if family == "funnel":
        return FunnelTokenizer(vocab={piece: i for i, piece in enumerate([*vocabulary, *(f"##{c}" for c in letters[:20])])})
    if family == "bert":
        names = dict(zip(("cls", "pad", "sep", "unk", "mask"), SPECIAL, strict=False))
        return BertTokenizer(vocab=vocabulary, **{f"{name}_token": piece for name, piece in names.items()})
    words = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Split("", "isolated")])
    words.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    names = dict(zip(("bos", "pad", "eos", "unk", "mask"), SPECIAL, strict=False))
    tokens = {f"{name}_token": piece for name, piece in names.items()} | {"cls_token": "<s>", "sep_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **tokens)


def transformers_arguments(encoder: TextEncoder, ids: Sequence[int], types: Sequence[int]) -> dict[str, Tensor]:
    """One text as transformers' own model takes it, with token types where its tokenizer has any."""
    made = {"input_ids": torch.tensor([list(ids)]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    return {**made, "token_type_ids": torch.tensor([list(types)])} if any(types) else made


@torch.no_grad()
def check_family(family: str) -> Outcome:
    """Compare a family with transformers."""
    torch.manual_seed(0)
    outcome, tokenizer, backbone = Outcome(family), make_tokenizer(family), make_backbone(family)
    alone = type(backbone)(backbone.config).eval()  # transformers' own model, which Tercet does not touch
    try:
        encoder = TextEncoder(backbone, tokenizer).eval()
    except InputError as error:
        outcome.refused = str(error)
        return outcome
    for parameter in encoder.parameters():  # so that tokens look at each other; the layouts have been chosen by now
        parameter.add_(0.1 * torch.randn_like(parameter))
    missing, unexpected = alone.load_state_dict(encoder.backbone.state_dict(), strict=False)
    assert not unexpected and all("pooler" in name for name in missing), (missing, unexpected)
    outcome.layout, outcome.max_length = encoder.execution.layout, encoder.max_length
    texts = tokenizer([*TEXTS, LONG], truncation=True, max_length=min(encoder.max_length, 60), return_token_type_ids=True)
    types = texts.get("token_type_ids") or [[0]] * len(texts["input_ids"])
    rows = [transformers_arguments(encoder, *row) for row in zip(texts["input_ids"], types, strict=True)]
    want = torch.stack([alone(**row).last_hidden_state[0].mean(0) for row in rows])
    encoder.set_max_length(60)
    inputs = encoder.prepare([*TEXTS, LONG])
    for layout in LAYOUTS[1:]:
        try:
            execution = encoder.runner.resolve(Execution(layout, "torch"))
        except InputError:
            continue
        outcome.difference[layout] = float((encoder.run(inputs, execution) - want).abs().max())
    outcome.masked_lm = check_masked_lm(encoder, rows)
    return outcome


def check_masked_lm(encoder: TextEncoder, rows: list[dict[str, Tensor]]) -> float | str:
    """The difference of the loss from that of transformers' language model on each text alone; or why it is refused."""
    try:
        head = MaskedLM(weight=0.1, probability=0.4).build(encoder)
    except InputError as error:
        return str(error)
    assert head is not None
    own = AutoModelForMaskedLM.from_config(encoder.backbone.config).eval()
    prefix = own.base_model_prefix
    weights = {f"{prefix}.{name}": x for name, x in encoder.backbone.state_dict().items()}
    missing, unexpected = own.load_state_dict({**weights, **head.lm.state_dict()}, strict=False)
    assert not unexpected and all("pooler" in name for name in missing), (missing, unexpected)
    inputs = encoder.prepare([*TEXTS, LONG])
    inputs.state.dropout_seed = derive_seed(torch.zeros_like(inputs.ids), torch.arange(len(inputs.ids)))
    got = head.eval()(inputs)
    corrupted, targets = head.corrupt(inputs.ids, inputs.state.dropout_seed)
    total = torch.zeros(())
    for ids, target, row in zip(*(x.split(inputs.lengths.tolist()) for x in (corrupted, targets)), rows, strict=True):
        logits = own(**{**row, "input_ids": ids[None]}).logits[0]
        total += F.cross_entropy(logits, target, reduction="sum")
    return float((got.loss_sum - total).abs() / got.normalizer)


def table(outcomes: Sequence[Outcome]) -> str:
    """Markdown: the families that run, and below them those that are refused."""
    head = ["family", "auto is", *LAYOUTS[1:], "masked LM"]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join(["---"] * len(head)) + " |"]
    for outcome in outcomes:
        if not outcome.refused:
            masked = None if isinstance(outcome.masked_lm, str) else outcome.masked_lm
            numbers = [*(outcome.difference.get(layout) for layout in LAYOUTS[1:]), masked]
            cells = ["–" if number is None else f"{number:.0e}" if number else "0" for number in numbers]
            lines.append("| " + " | ".join([outcome.family, outcome.layout, *cells]) + " |")
    refused = [f"- {outcome.family}: {outcome.refused}" for outcome in outcomes if outcome.refused]
    return "\n".join([*lines, "", *refused])


def main() -> None:
    """Print the table of the families that the command line names, else of all."""
    transformers_logging.set_verbosity_error()
    print(table([check_family(family) for family in sys.argv[1:] or FAMILIES]))


if __name__ == "__main__":
    main()
