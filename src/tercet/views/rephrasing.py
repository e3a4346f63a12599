"""Views that say a text in other words: synonyms of a list, and predictions of a masked language model."""

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tercet.errors import InputError, require
from tercet.messages import warn_once
from tercet.paths import locate
from tercet.rng import derive_seed, uniform
from tercet.types import TokenBatch
from tercet.views.text_views import RowView, TokenInfo, TokenLayout, repeat_tokens

MLM_ROWS = 32  # of one forward pass of a masked language model, whose logits are as wide as the vocabulary


class SynonymTable(NamedTuple):
    """Synonyms of W words as token ids: those of word w are ``first[w]`` to ``first[w] + number[w]`` of S synonyms."""

    word: Tensor  # (W,), hashes, ascending
    first: Tensor  # (W,)
    number: Tensor  # (W,)
    start: Tensor  # (S,), in ``ids``
    length: Tensor  # (S,)
    ids: Tensor  # of all synonyms, one after the other


@dataclass(frozen=True)
class Synonyms(RowView):
    r"""Replace words by synonyms of a list, each with probability ``rate`` (as in SimCSE, arXiv:2104.08821, Table 1).

    ``path`` is a text file with a word on each line and, after a tab each, its synonyms, which may be several words. A word is
    found in the spelling of the list and with a capital, if its tokens are those of the word alone (in byte-level BPE
    punctuation belongs to the word before it). Rows that would be longer than ``info.max_length`` stay as they are.

    >>> import tempfile
    >>> from tercet.models import make_tokenizer
    >>> with tempfile.NamedTemporaryFile("w", suffix=".tsv", delete=False) as file:
    ...     _ = file.write("big\tvery large\n")
    >>> tokenizer = make_tokenizer(["a", "big", "dog", "large", "very"])
    >>> info = TokenInfo(torch.ones(len(tokenizer), dtype=torch.bool), torch.arange(len(tokenizer)) < 2, tokenizer=tokenizer)
    >>> text = TokenBatch.from_lists(tokenizer(["a big dog"])["input_ids"])
    >>> tokenizer.decode(Synonyms(file.name, rate=1.0)(text, torch.tensor([3]), info).ids)
    'a very large dog'
    """

    path: str
    rate: float = 0.3
    lines: tuple[tuple[str, ...], ...] = field(init=False, repr=False)
    tables: dict[int, SynonymTable] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        require(0 <= self.rate <= 1, f"Synonyms with `rate`={self.rate}: a rate from 0 to 1.")
        file = locate(self.path)
        require(file.is_file(), f"Synonyms with `path`={self.path}: there is no such file.")
        lines = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines()]
        cells = [tuple(text for cell in line if (text := cell.strip())) for line in lines]
        for number, line in enumerate(cells, 1):
            require(len(line) != 1, f"`path`={self.path}: line {number} has no tab: a word, a tab, a synonym are needed.")
        object.__setattr__(self, "lines", tuple(line for line in cells if line))
        require(self.lines, f"`path`={self.path} has no words.")

    def _edit(self, inputs: TokenBatch, at: TokenLayout, seed: Tensor, info: TokenInfo) -> TokenBatch:
        if id(info.tokenizer) not in self.tables:
            self.tables[id(info.tokenizer)] = self._table(info)
        ids, table = inputs.ids, SynonymTable(*(x.to(inputs.ids.device) for x in self.tables[id(info.tokenizer)]))
        token = torch.arange(len(ids), device=ids.device)
        number = at.word + (at.num_words.cumsum(0) - at.num_words)[at.row]  # of the word, over all rows
        begins = at.content & (number != torch.cat([number.new_tensor([-1]), number.masked_fill(~at.content, -1)[:-1]]))
        place = token - torch.where(begins, token, 0).cummax(0).values  # in the word
        hashes = torch.zeros_like(ids).index_add(0, number[at.content], derive_seed(ids, place)[at.content])[number]
        word = torch.searchsorted(table.word, hashes).clamp(max=len(table.word) - 1)
        chosen = at.content & (table.word[word] == hashes) & (uniform(seed[at.row], 2 * at.word) < self.rate)
        drawn = (uniform(seed[at.row], 2 * at.word + 1) * table.number[word]).long()
        synonym = table.first[word] + drawn
        repeats = torch.where(chosen, table.length[synonym] * begins, 1)
        lengths = torch.zeros_like(at.num_words).index_add(0, at.row, repeats)
        chosen &= (lengths <= info.max_length)[at.row]
        repeats = torch.where(chosen, repeats, 1)
        out = repeat_tokens(inputs, repeats, at.row)
        source = token.repeat_interleave(repeats)
        inside = torch.arange(len(source), device=ids.device) - (repeats.cumsum(0) - repeats)[source]
        new = table.ids[(table.start[synonym][source] + inside).clamp(max=len(table.ids) - 1)]
        return replace(out, ids=torch.where(chosen[source], new, out.ids))

    def _table(self, info: TokenInfo) -> SynonymTable:
        """The list in the tokens of a tokenizer, with and without a space before each word."""
        found: dict[int, dict[tuple[int, ...], None]] = {}
        several = 0
        for word, *synonyms in self.lines:
            for change in (str, str.capitalize):
                for space in ("", " "):
                    key, *values = (_tokens(info, space + change(text)) for text in (word, *synonyms))
                    if not key or bool(info.word_start[list(key[1:])].any()):
                        several += change is str and not space
                        continue
                    hashed = int(derive_seed(torch.tensor(key), torch.arange(len(key))).sum())
                    found.setdefault(hashed, {}).update(dict.fromkeys(value for value in values if value))
        usable = sorted((word, list(values)) for word, values in found.items() if values)
        require(usable, f"`path`={self.path}: no word of it is a word of the tokenizer.")
        if several:
            warn_once(
                f"{self.path}: {several} of {len(self.lines)} words are several or unknown to the tokenizer: never found."
            )
        count = torch.tensor([len(values) for _, values in usable])
        flat = [value for _, values in usable for value in values]
        length = torch.tensor([len(value) for value in flat])
        ids = torch.tensor([token for value in flat for token in value])
        word_hashes = torch.tensor([word for word, _ in usable])
        return SynonymTable(word_hashes, count.cumsum(0) - count, count, length.cumsum(0) - length, length, ids)


def _tokens(info: TokenInfo, text: str) -> tuple[int, ...]:
    """The ids of a text without special tokens; none where it holds an unknown one."""
    require(info.tokenizer is not None, "Synonyms: the tokenizer of the texts is not known.")
    ids = info.tokenizer(text, add_special_tokens=False)["input_ids"]
    return () if info.tokenizer.unk_token_id in ids else tuple(ids)


@dataclass(frozen=True)
class MLMReplacement(RowView):
    """Replace each token with probability ``rate`` by a prediction of a masked language model.

    In SimCSE's Table 1 (arXiv:2104.08821) BERT-base replaces 15 %. ``name`` is the folder or hub id of a model with a
    language-model head and the vocabulary of the texts. The chosen tokens of a row are masked together; each becomes one of
    its ``top_k`` most probable tokens (1: the most probable, which may be the same again). Costs a forward pass of that model
    over the view.

    >>> MLMReplacement("google-bert/bert-base-uncased").rate
    0.15
    """

    name: str
    rate: float = 0.15
    top_k: int = 1
    models: dict[int, Any] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.top_k >= 1, f"MLMReplacement with `top_k`={self.top_k}: 1 (the most probable token) or more.")

    @torch.no_grad()
    def _edit(self, inputs: TokenBatch, at: TokenLayout, seed: Tensor, info: TokenInfo) -> TokenBatch:
        if id(info.tokenizer) not in self.models:
            self.models[id(info.tokenizer)] = self._load(info)
        model, mask_id = self.models[id(info.tokenizer)].to(inputs.ids.device), info.tokenizer.mask_token_id
        chosen = at.content & (uniform(seed[at.row], at.offset) < self.rate)
        masked = replace(inputs, ids=inputs.ids.masked_fill(chosen, mask_id))
        predictions = []
        for rows in torch.arange(len(inputs)).split(MLM_ROWS):
            ids, mask, _ = masked.select(rows).pad(info.tokenizer.pad_token_id or 0)
            logits = model(input_ids=ids, attention_mask=mask).logits[ids == mask_id]
            logits[:, : len(info.special)].masked_fill_(info.special.to(logits.device), -torch.inf)
            logits[:, len(info.special) :] = -torch.inf
            predictions.append(logits.topk(self.top_k).indices)
        top = torch.cat(predictions)
        at_mask = (masked.ids == mask_id).nonzero()[:, 0]  # also those that the text had before
        drawn = (uniform(derive_seed(seed, 1)[at.row[at_mask]], at.offset[at_mask]) * self.top_k).long()
        ids = inputs.ids.index_copy(0, at_mask, top.gather(1, drawn[:, None])[:, 0])
        return replace(inputs, ids=torch.where(chosen, ids, inputs.ids))

    def _load(self, info: TokenInfo) -> Any:
        from transformers import AutoModelForMaskedLM

        from tercet.models.pretrained import load_pretrained, load_tokenizer  # the models import this package

        if info.mask_id is None:
            raise InputError("MLMReplacement: the tokenizer has no mask token. Use Synonyms.")
        same = load_tokenizer(self.name).get_vocab() == info.tokenizer.get_vocab()
        require(same, f"MLMReplacement with `name`={self.name}: its vocabulary is not that of the encoder.")
        model, report = load_pretrained(AutoModelForMaskedLM, self.name, output_loading_info=True)
        missing = ", ".join(sorted(report["missing_keys"]))
        require(not missing, f"MLMReplacement with `name`={self.name}: it has no language-model head ({missing} are missing).")
        return model.eval()
